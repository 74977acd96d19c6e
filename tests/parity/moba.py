"""Parity adapter of MoBA: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.analysis.snr import failure_probability, required_snr, routing_snr


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case; inputs are packed `[T, H, D]` with `cu_seqlens`, and `snr_in` rows (dmu, d, B, n, k)."""
    size, top_k = config["block_size"], config["top_k"]
    results = {}
    packed = {"cu_seqlens_q": inputs["cu_seqlens"], "cu_seqlens_k": inputs["cu_seqlens"]}
    query, key, value = (inputs[name].transpose(0, 1)[None].requires_grad_() for name in "qkv")

    routes = ops.select_routes(query, key, block_size=size, top_k=top_k, **packed)
    out, lse = ops.routed_block_attention(query, key, value, routes, block_size=size, return_lse=True, **packed)
    (out[0].transpose(0, 1) * inputs["dout"]).sum().backward()
    results["out"], results["lse"] = out[0].transpose(0, 1), lse[0].T
    results.update({f"d{name}": t.grad[0].transpose(0, 1) for name, t in zip("qkv", (query, key, value), strict=True)})
    lengths = inputs["cu_seqlens"].diff()
    num_blocks = int(-(-lengths.max() // size))
    results["select"] = _select(routes, num_blocks)
    results.update(_layout(routes, inputs["cu_seqlens"].tolist(), num_blocks))

    with torch.no_grad():
        own = ops.select_routes(query, key, block_size=size, top_k=1, **packed)
        results["out_topk1"] = ops.routed_block_attention(query, key, value, own, block_size=size, **packed)[
            0
        ].transpose(0, 1)
        free = ops.select_routes(query, key, block_size=size, top_k=top_k, causal=False, **packed)
        out, lse = ops.routed_block_attention(
            query, key, value, free, block_size=size, causal=False, return_lse=True, **packed
        )
    results["noncausal_out"], results["noncausal_lse"] = out[0].transpose(0, 1), lse[0].T
    results["noncausal_select"] = _select(free, num_blocks)
    results.update(_key_convolution(inputs, size, top_k, num_blocks))
    results["snr_out"] = torch.stack([_snr(*row) for row in inputs["snr_in"].tolist()])
    return results


def _key_convolution(inputs: dict[str, Tensor], size: int, top_k: int, num_blocks: int) -> dict[str, Tensor]:
    """The same attention over convolved keys (spec 2.5), with gradients of the raw inputs and of the weight."""
    packed = {"cu_seqlens_q": inputs["cu_seqlens"], "cu_seqlens_k": inputs["cu_seqlens"]}
    query, key, value = (inputs[name].detach().transpose(0, 1)[None].clone().requires_grad_() for name in "qkv")
    weight = inputs["kconv_weight"].detach().clone().requires_grad_()
    keys = ops.key_convolution(key, weight, cu_seqlens=inputs["cu_seqlens"])
    routes = ops.select_routes(query, keys, block_size=size, top_k=top_k, **packed)
    out = ops.routed_block_attention(query, keys, value, routes, block_size=size, **packed)[0].transpose(0, 1)
    (out * inputs["dout"]).sum().backward()
    results = {
        "kconv_k": keys[0].transpose(0, 1),
        "kconv_out": out,
        "kconv_select": _select(routes, num_blocks),
        "kconv_dweight": weight.grad,
    }
    pairs = zip("qkv", (query, key, value), strict=True)
    return results | {f"kconv_d{name}": tensor.grad[0].transpose(0, 1) for name, tensor in pairs}


def _select(routes: Tensor, num_blocks: int) -> Tensor:
    """uint8 `[H, T, n]`: 1 where a query attends to a block of its sequence."""
    chosen = torch.zeros(*routes.shape[1:3], num_blocks + 1, dtype=torch.uint8)
    chosen.scatter_(2, torch.where(routes[0] < 0, num_blocks, routes[0]).long(), 1)
    return chosen[..., :num_blocks]


def _layout(routes: Tensor, bounds: list[int], num_blocks: int) -> dict[str, Tensor]:
    offsets, counts, rows, total = [], [], [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        offset, nnz, row = ops.key_block_major(routes[:, :, start:end], num_blocks)
        offsets.append(torch.where(nnz > 0, offset + total, 0))
        counts.append(nnz)
        rows.append(row)
        total += row.numel()
    return {"col_offsets": torch.cat(offsets), "col_nnz": torch.cat(counts), "row_indices": torch.cat(rows)}


def _snr(dmu_eff: float, head_dim: float, block_size: float, num_blocks: float, top_k: float) -> Tensor:
    snr = routing_snr(dmu_eff, head_dim, block_size)
    need = required_snr(int(num_blocks), int(top_k))
    return torch.tensor([snr, failure_probability(snr), need], dtype=torch.float64)
