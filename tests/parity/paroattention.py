"""Parity adapter of PAROAttention: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.grid import AXIS_ORDERS, TokenGrid, axis_permutation
from hf_attn.mechanisms import paroattention as paro
from hf_attn.pattern import BlockPattern


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case; `q`, `k`, `v` `[B, H, N, D]` with text on the side that the config names."""
    text = config["text_tokens"]
    sides = {"text_before": text} if config["text_first"] else {"text_after": text}
    grid = TokenGrid(*config["grid"], **sides)
    query, key, value = (inputs[name] for name in "qkv")
    block, scale = config["block"], config["softmax_scale"]
    results = {"order_index": torch.stack([axis_permutation(grid, o, text="none").forward for o in range(6)])}

    options = {"scale": scale, "block_size": block}
    wide = query.double(), key.double()
    sparse, quant = paro.order_scores(*wide, grid, epsilon=config["epsilon"], sigma=config["sigma"], **options)
    results |= {"m_sparse": sparse, "m_quant": quant, "score": paro.paper_score(sparse, quant, config["alpha"])}
    choice = results["choice"] = results["score"].argmin(-1)

    maps = paro.block_mass(*wide, grid, orders=list(range(len(AXIS_ORDERS))), **options)
    mass = results["block_mass"] = maps[choice, torch.arange(len(choice))]
    forced = paro.forced_blocks(mass, grid, block)
    mask = paro.keep_blocks(mass, forced, config["density"], budget="on_top", groups=len(mass))
    results["block_mask"] = mask

    order = paro.Reordering(grid, choice.tolist())
    moved = [order.apply(x) for x in (query, key, value)]
    sizes = {"block_q": block, "block_k": block, "q_len": grid.length, "k_len": grid.length}
    pattern = BlockPattern.from_dense(mask[None], **sizes)
    every = BlockPattern.full(**sizes)
    results["out_dense"] = order.undo(ops.block_sparse_attention(*moved, every, scale=scale))
    results["out_sparse"] = order.undo(ops.block_sparse_attention(*moved, pattern, scale=scale))
    groups = {"q_group": config["q_group"], "k_group": config["k_group"], "scale": scale}
    for bits in (8, 4):
        out = ops.quantized_block_attention(*moved, pattern, qk_bits=bits, pv_bits=bits, **groups)
        results[f"out_qk{bits}_pv{bits}"] = order.undo(out)
    return results
