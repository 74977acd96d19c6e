"""Block-sparse attention by the compiled CPU kernel: the tiles of a plan, handed over as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import Lists, Rows, Segments, attend
from .tiling import TilePlan

# Tiles of fewer rows leave more than half of the kernel's lanes empty.
FEWEST_ROWS = 16


def forward(plan: TilePlan, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, lse: Tensor) -> bool:
    """Writes the rows of the plan's tiles and returns whether they are finite.

    query `[B, Hq, Nq, D]`, out and lse contiguous `[B, Hq, Nq, ...]`: all rows, not those of the plan alone.
    """
    strides = query.stride(), key.stride(), value.stride()
    if strides not in plan.prepared:
        plan.prepared[strides] = _rows(plan, query), _segments(plan, key, value), _lists(plan)
    rows, segments, lists = plan.prepared[strides]
    return attend(query, key, value, rows, segments, lists, scale, out, lse)


def _lists(plan: TilePlan) -> Lists:
    bound = torch.arange(plan.local.shape[1]) < plan.counts[:, None]
    blocks = plan.local + plan.head_rows(plan.geometry.kv_heads)[:, None] * plan.geometry.key_blocks
    return Lists.from_mask(bound, blocks)


def _rows(plan: TilePlan, query: Tensor) -> Rows:
    """The rows of each head of a tile are a run."""
    geometry, pair = plan.geometry, plan.tiles // plan.blocks
    head = (pair % plan.heads * plan.fold)[:, None] + torch.arange(plan.fold)  # [t, fold]
    row = (plan.first_row + plan.tiles % plan.blocks * plan.block_rows)[:, None].expand_as(head)
    batch = (pair // plan.heads)[:, None]
    offsets = batch * query.stride(0) + head * query.stride(1) + row * query.stride(2)
    numbers = (batch * geometry.q_heads + head) * geometry.q_len + row
    positions = (row + geometry.k_len - geometry.q_len).flatten().int() if geometry.causal else None
    starts = torch.arange(len(plan.tiles) + 1) * plan.fold
    lengths = torch.full((numbers.numel(),), plan.block_rows, dtype=torch.int32)
    return Rows(starts, offsets.flatten(), numbers.flatten(), lengths, positions)


def _segments(plan: TilePlan, key: Tensor, value: Tensor) -> Segments:
    """All key blocks of all heads, in the order of `head_rows`."""
    geometry = plan.geometry
    begin = torch.arange(geometry.key_blocks) * geometry.block_k
    batch = torch.arange(geometry.batch)[:, None, None]
    head = torch.arange(geometry.kv_heads)[:, None]
    keys, values = ((batch * x.stride(0) + head * x.stride(1) + begin * x.stride(2)).flatten() for x in (key, value))
    low = begin.int().repeat(geometry.batch * geometry.kv_heads)
    lengths = (geometry.k_len - low).clamp(max=geometry.block_k)
    return Segments(keys, values, lengths, low, low + lengths - 1)
