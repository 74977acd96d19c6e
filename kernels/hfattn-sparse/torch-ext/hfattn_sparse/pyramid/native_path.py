"""Pyramid attention by the compiled CPU kernel: a level of a key block is a segment of pooled keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import Lists, Pools, Rows, Segments, attend
from .pooling import LEVELS, last_positions, num_blocks, pool_counts

# Tiles of fewer rows leave more than half of the kernel's lanes empty.
FEWEST_ROWS = 16


def scores(levels: Tensor, block_q: int, block_k: int) -> int:
    """How many scores the levels `[..., nq, nk]` ask for, rows and blocks taken as full."""
    return int(torch.where(levels > 0, block_k // levels.clamp(min=1), 0).sum()) * block_q


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Writes out and lse, contiguous, and returns whether out is finite.

    Pooled keys and sums of values are rounded to the dtype of the query.
    """
    segments = _segments(key, value, block_k, causal, tail)
    lists = _lists(levels, query.shape, key.shape, block_q, block_k)
    return attend(query, key, value, _rows(query, key.shape[2], block_q, causal), segments, lists, scale, out, lse)


def _segments(key: Tensor, value: Tensor, block_k: int, causal: bool, tail: str) -> Segments:
    """By batch row, KV head, block and level. Keys past the end, and empty pools, lie behind the segments' ends."""
    weights, _ = pool_counts(key.shape[2], block_k, tail)
    blocks, pools = weights.shape
    sizes = torch.tensor(LEVELS)
    lengths = block_k // sizes
    first = (lengths.cumsum(0) - lengths + torch.arange(blocks)[:, None] * pools).flatten()
    begin = torch.arange(blocks)[:, None] * block_k
    real = (key.shape[2] - begin).clamp(max=block_k)
    filled = (real + sizes - 1) // sizes
    if tail == "replicate":
        filled[:, 1:] = lengths[1:]
    last = last_positions(key.shape[2], block_k, tail).flatten().int()
    heads = key.shape[0] * key.shape[1]
    batch, head = torch.arange(key.shape[0])[:, None, None], torch.arange(key.shape[1])[:, None]
    at = [
        (batch * x.stride(0) + head * x.stride(1) + begin.expand(-1, len(LEVELS)).flatten() * x.stride(2)).flatten()
        for x in (key, value)
    ]
    ends = first + filled.flatten() - 1
    by_key = Pools(
        sizes.int().repeat(heads * blocks),
        real.expand(-1, len(LEVELS)).flatten().int().repeat(heads),
        tail == "replicate",
        first.repeat(heads),
        last if causal else None,
        weights.float().flatten(),
    )
    return Segments(
        *at, filled.flatten().int().repeat(heads), last[first].repeat(heads), last[ends].repeat(heads), by_key
    )


def _lists(levels: Tensor, query: torch.Size, key: torch.Size, block_q: int, block_k: int) -> Lists:
    batch, heads, kv_heads = query[0], query[1], key[1]
    num_q, num_k = num_blocks(query[2], block_q), num_blocks(key[2], block_k)
    levels = levels[:, :, :num_q, :num_k].expand(batch, heads, num_q, num_k)
    kind = torch.zeros(LEVELS[-1] + 1, dtype=torch.int64)
    kind[torch.tensor(LEVELS)] = torch.arange(len(LEVELS))
    row = torch.arange(batch)[:, None] * kv_heads + torch.arange(heads) // (heads // kv_heads)
    segment = (row[:, :, None, None] * num_k + torch.arange(num_k)) * len(LEVELS) + kind[levels.long()]
    return Lists.from_mask((levels > 0).flatten(0, 2), segment.flatten(0, 2))


def _rows(query: Tensor, k_len: int, block_q: int, causal: bool) -> Rows:
    """Every query block of every head is a tile."""
    batch, heads, q_len, _ = query.shape
    row = torch.arange(0, q_len, block_q)
    head, entry = torch.arange(heads)[:, None], torch.arange(batch)[:, None, None]
    offsets = (entry * query.stride(0) + head * query.stride(1) + row * query.stride(2)).flatten()
    numbers = ((entry * heads + head) * q_len + row).flatten()
    lengths = (q_len - row).clamp(max=block_q).int().repeat(batch * heads)
    positions = (row + k_len - q_len).int().repeat(batch * heads) if causal else None
    return Rows(torch.arange(len(numbers) + 1), offsets, numbers, lengths, positions)
