"""Parity adapter of VMoBA: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid, partition
from hf_attn.mechanisms.vmoba import MECHANISM, PATTERNS, VMoBAConfig

OPTION = {"1d": "temporal_block", "2d": "spatial_block", "3d": "st_block"}
HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case; `q`, `k`, `v` `[B, H, N, D]` lie row-major on `config["grid"]`."""
    grid = TokenGrid(*config["grid"])
    query, key = inputs["q"], inputs["k"]
    results = {}
    for pattern, block in config["partitions"].items():
        parts = partition(grid, tuple(block) if isinstance(block, list) else block)
        order = parts.permutation
        results[f"order_{pattern}"] = order.forward
        moved = order.apply(key)
        results[f"gate_{pattern}"] = ops.block_scores(order.apply(query), moved, block_size=parts.block_tokens)[0]
        for name, mode in config["modes"].items():
            rule = {"tau": mode["tau"]} if mode["select"] == "threshold" else {"top_k": mode["topk"]}
            chosen = ops.select_pooled_routes(
                query, moved, parts.block_of(), block_size=parts.block_tokens, scope=mode["scope"], **rule
            )
            results[f"sel_{pattern}_{name}"] = chosen.mT[0]
            results[f"out_{pattern}_{name}"] = _attend(inputs, config, grid, pattern, block, mode)
    pattern, name = config["grad_case"]
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    case = dict(zip("qkv", leaves, strict=True))
    out = _attend(case, config, grid, pattern, config["partitions"][pattern], config["modes"][name])
    grads = torch.autograd.grad((out * inputs["grad_out"]).sum(), leaves)
    return {**results, **{f"grad_{name}": grad for name, grad in zip("qkv", grads, strict=True)}}


def _attend(inputs: dict[str, Tensor], config: dict, grid: TokenGrid, pattern: str, block, mode: dict) -> Tensor:
    """The mechanism in a layer of this pattern."""
    rule = {"select": "threshold", "tau": mode["tau"]} if mode["select"] == "threshold" else {"top_k": mode["topk"]}
    options = VMoBAConfig(scope=mode["scope"], min_tokens=0, **rule, **{OPTION[pattern]: block})
    tokens = TokenLayout(inputs["q"].shape[0], grid.tokens, grid.tokens, grid=grid)
    layer = LayerContext(index=PATTERNS.index(pattern))
    tensors = (inputs[name] for name in "qkv")
    return MECHANISM(AttentionCall(*tensors, config["softmax_scale"], False, tokens, layer), options)
