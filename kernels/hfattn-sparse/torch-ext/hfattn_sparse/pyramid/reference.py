"""Pyramid attention, the specification: all pools of all keys, a dense mask and one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import masked_attention
from .pooling import LEVELS, last_positions, pool_counts, pool_sums


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_g p_ig V_g over the pools g of level r of every key block j with levels[i // block_q, j] = r > 0.

    p_ig = exp(scale * q_i.K_g + ln(w_g) - lse_i); K_g, V_g are means over the members of pool g and w_g is what it
    weighs (see `pooling.pool_counts`). Any dtype including fp64; differentiable in query, key and value.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        levels: uint8 `[B | 1, Hq | 1, ceil(Nq / block_q), ceil(Nk / block_k)]` of 0 (skip), 1, 2, 4, 8.
        block_k: divisible by 8.
        causal: query row r sees a pool when its last member is at most `r + Nk - Nq`.
        tail: "replicate" or "exact", how the partial last block is pooled.

    Returns:
        out `[B, Hq, Nq, Dv]`, lse `[B, Hq, Nq]`.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if k_len == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3]), query.new_full(
            query.shape[:3], float("-inf"), dtype=dtype
        )
    weights, members = pool_counts(k_len, block_k, tail, query.device)
    pooled = [
        (pool_sums(x.to(dtype), block_k, tail) / members.to(dtype)[..., None]).flatten(2, 3) for x in (key, value)
    ]
    allowed = pool_mask(levels, block_k).repeat_interleave(block_q, 2)[:, :, :q_len] & (weights.flatten() > 0)
    if causal:
        rows = torch.arange(k_len - q_len, k_len, device=query.device)[:, None]
        allowed = allowed & (last_positions(k_len, block_k, tail, query.device).flatten() <= rows)
    bias = weights.flatten().clamp(min=1).to(dtype).log()
    out, lse = masked_attention(query.to(dtype), *pooled, allowed, scale=scale, bias=bias)
    return out.to(query.dtype), lse


def pool_mask(levels: Tensor, block_k: int) -> Tensor:
    """Bool `[B | 1, H | 1, nq, nk * 15 b / 8]`: the pools that each query block reads."""
    chosen = [(levels == level)[..., None].expand(*levels.shape, block_k // level) for level in LEVELS]
    return torch.cat(chosen, -1).flatten(3)
