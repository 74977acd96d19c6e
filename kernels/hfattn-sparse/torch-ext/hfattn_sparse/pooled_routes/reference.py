"""Choice of key blocks from pools of scores, the specification: a sort of every pool (VMoBA, arXiv 2506.23858)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What makes a pool: dimensions of scores [B, H, n, N] that are in it together, the others number the pools.
SCOPES = {"head_global": (2, 3), "query_head": (2,), "block": (1, 3), "overall": (1, 2, 3)}
# A pool whose scores differ by less is flat.
FLAT = 1e-6


def block_scores(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Mean key of every block times every query, `[B, Hq, ceil(Nk / block_size), Nq]`, fp32 (fp64 for fp64).

    Not scaled; the last block's mean is over the keys it has; query head h reads key head h // (Hq // Hkv).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    means = torch.stack([piece.mean(2) for piece in key.to(dtype).split(block_size, 2)], 2)
    return means.repeat_interleave(query.shape[1] // key.shape[1], 1) @ query.to(dtype).mT


def select(scores: Tensor, own: Tensor, *, rule: str, scope: str, amount: float) -> Tensor:
    """Chosen (block, query) pairs, bool `[B, H, n, N]`; a query's own block is always chosen.

    Args:
        scores: `[B, H, n, N]`; own: int64 `[N]`, the block of every query.
        rule, scope, amount: as `ops.select_pooled_routes` has them.
    """
    everything = (rule == "threshold" and amount >= 1) or (rule == "top_k" and amount >= scores.shape[2])
    if everything or not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    mine = own_pairs(own, scores)
    values, owned = to_pools(scores, scope), to_pools(mine, scope)
    if rule == "threshold":
        chosen = _by_share(values, owned, amount)
    else:
        chosen = _by_count(values, owned, top_counts(scores.shape, scope, amount, scores.device))
    return from_pools(chosen, scope, scores.shape) | mine


def own_pairs(own: Tensor, scores: Tensor) -> Tensor:
    """Bool `[B, H, n, N]`: whether a query lies in the block."""
    blocks = torch.arange(scores.shape[2], device=scores.device)
    return (own.to(scores.device) == blocks[:, None]).expand(scores.shape)


def top_counts(shape: torch.Size, scope: str, amount: float, device: torch.device) -> Tensor:
    """Pairs each pool keeps, own ones included, int64 `[pools]`, for `amount` blocks a query on average.

    Pools of single queries cannot hold fractions: evenly spread queries take one block more than the others.
    """
    batch, heads, _, queries = shape
    if scope == "query_head":
        share = amount - math.floor(amount)
        steps = (torch.arange(queries + 1, dtype=torch.float64) * share + 1e-9).floor()
        counts = math.floor(amount) + steps.diff()
        return counts.long().repeat(batch * heads).to(device)
    pools, size = (batch * heads, queries) if scope == "head_global" else (batch, heads * queries)
    return torch.full((pools,), round(amount * size), device=device)


def _by_share(values: Tensor, owned: Tensor, tau: float) -> Tensor:
    """The best pairs `[P, L]` that together with the own ones hold the share `tau` of the pool's similarity."""
    similarity = normalised(values)
    total = similarity.sum(1, dtype=torch.float64, keepdim=True) + FLAT
    need = (tau - (similarity * owned).sum(1, dtype=torch.float64, keepdim=True) / total).clamp(min=0)
    ranked = similarity.masked_fill(owned, -1).sort(dim=1, descending=True, stable=True)
    covered = ranked.values.clamp(min=0).cumsum(1, dtype=torch.float64) / total
    reached = covered >= need
    last = torch.where(reached.any(1), reached.int().argmax(1), values.shape[1] - 1)
    keep = torch.arange(values.shape[1], device=values.device) <= last[:, None]
    return torch.zeros_like(owned).scatter_(1, ranked.indices, keep)


def _by_count(values: Tensor, owned: Tensor, counts: Tensor) -> Tensor:
    """The `counts` best pairs of every pool `[P, L]`, own ones first."""
    order = values.masked_fill(owned, torch.inf).argsort(dim=1, descending=True, stable=True)
    keep = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    return torch.zeros_like(owned).scatter_(1, order, keep)


def normalised(values: Tensor) -> Tensor:
    """Every pool `[P, L]` stretched to 0 .. 1."""
    low, high = values.aminmax(dim=1, keepdim=True)
    span = high - low
    return (values - low) / torch.where(span <= FLAT, 1, span)


def to_pools(x: Tensor, scope: str) -> Tensor:
    """`[B, H, n, N]` -> `[pools, L]`, pairs in the order of the dimensions."""
    inside = SCOPES[scope]
    outside = [dim for dim in range(4) if dim not in inside]
    return x.permute(*outside, *inside).reshape(-1, math.prod(x.shape[dim] for dim in inside))


def from_pools(pools: Tensor, scope: str, shape: torch.Size) -> Tensor:
    """The inverse of `to_pools`."""
    inside = SCOPES[scope]
    order = [*(dim for dim in range(4) if dim not in inside), *inside]
    back = [order.index(dim) for dim in range(4)]
    return pools.view([shape[dim] for dim in order]).permute(back)
