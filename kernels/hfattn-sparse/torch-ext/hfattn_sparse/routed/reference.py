"""Routed block attention, the specification: a dense mask and one softmax (MoBA, arXiv 2502.13189, 2511.11571)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import causal_mask, masked_attention


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, *, block_size: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j p_ij v_j over keys j whose block `j // block_size` is in `routes[i]`.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        routes: int `[B, Hq, Nq, k]`, block ids in any order, -1 padded; a repeated id counts once. Or bool
            `[B, Hq, Nq, n]`: whether a query reads a block.
        causal: query row r sees keys up to `r + Nk - Nq`.

    Returns:
        out `[B, Hq, Nq, Dv]`, lse `[B, Hq, Nq]`. Differentiable; routes carry no gradient.
    """
    allowed = route_mask(routes, key.shape[2], block_size)
    if causal:
        allowed = allowed & causal_mask(query.shape[2], key.shape[2], query.device)
    return masked_attention(query, key, value, allowed, scale=scale)


def route_mask(routes: Tensor, k_len: int, block_size: int) -> Tensor:
    """Bool `[B, Hq, Nq, k_len]`: keys of the routed blocks."""
    num_blocks = -(-k_len // block_size)
    if routes.dtype == torch.bool:
        return routes.repeat_interleave(block_size, 3)[..., :k_len]
    blocks = torch.zeros(*routes.shape[:3], num_blocks + 1, dtype=torch.bool, device=routes.device)
    outside = (routes < 0) | (routes >= num_blocks)
    blocks.scatter_(3, torch.where(outside, num_blocks, routes).long(), True)
    return blocks[..., :num_blocks].repeat_interleave(block_size, 3)[..., :k_len]


def select_routes(query: Tensor, key: Tensor, *, block_size: int, top_k: int, causal: bool) -> Tensor:
    """Blocks each query attends to: its own, and the best past ones by query . mean key (moba.md 2.1, 2.2).

    Returns int32 `[B, Hq, Nq, min(top_k, n)]`, ascending, -1 padded. On equal scores the later block wins.
    """
    batch, q_heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    num_blocks = -(-k_len // block_size)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    pieces = key.to(dtype).split(block_size, 2)
    centroids = torch.stack([piece.mean(2) for piece in pieces], 2).repeat_interleave(q_heads // kv_heads, 1)
    scores = query.to(dtype) @ centroids.mT
    keep = min(top_k, num_blocks)
    if causal:
        position = torch.arange(k_len - q_len, k_len, device=query.device)[:, None]
        own = position.div(block_size, rounding_mode="floor")
        block = torch.arange(num_blocks, device=query.device)
        scores = scores.masked_fill(block > own, float("-inf")).masked_fill(block == own, float("inf"))
        reachable = (own + 1).clamp(min=0)
    else:
        reachable = torch.full((q_len, 1), num_blocks, device=query.device)
    # Flipping puts later blocks first, and a stable sort keeps that order among equals.
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    best = (num_blocks - 1 - order)[..., :keep]
    unused = torch.arange(keep, device=query.device) >= reachable
    best = torch.where(unused, num_blocks, best).sort(-1).values
    return torch.where(best == num_blocks, -1, best).to(torch.int32)
