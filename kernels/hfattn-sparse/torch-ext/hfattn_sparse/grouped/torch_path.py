"""Attention by a grouped softmax in plain torch: tiles of query rows, two levels of softmax a tile.

A query's own block is one more group whose logit is the log of the sum of its exponentials, so every group has a gate p
(softmax over groups) and weights r inside, and w = p * r everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Groups

# Scores held at a time, and the fewest rows of a tile.
MAX_SCORES, MIN_ROWS = 1 << 21, 16
NEG_INF = float("-inf")


class _Tile(NamedTuple):
    """Query rows `start:stop` of a tile; `blocks` first blocks are read, from `mixed` on rows see them partly."""

    start: int
    stop: int
    blocks: int
    mixed: int


def forward(query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`; formulas in the reference. Memory is linear in the keys.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`, one sequence a row.
        groups: its blocks, the same for all rows.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=dtype)
    keys, values, ends = _gather(key, value, groups, dtype)
    for tile in _tiles(query, groups):
        rows = _fold(query, tile, key.shape[1], dtype)
        gates, weights, total = _weights(rows, keys, ends, groups, tile, scale)
        weights.mul_(gates[..., None])
        width = tile.blocks * groups.places.shape[1]
        part = _times(weights.flatten(-2), values[:, :, :width])
        out[:, :, tile.start : tile.stop] = part.flatten(1, 2)
        lse[:, :, tile.start : tile.stop] = total.flatten(1, 2)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for `forward` with the same arguments; weights are computed again."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = key.shape[1]
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    keys, values, ends = _gather(key, value, groups, dtype)
    grad_keys, grad_values, grad_ends = (torch.zeros_like(x) for x in (keys, values, ends))
    for tile in _tiles(query, groups):
        width = tile.blocks * groups.places.shape[1]
        span = slice(0, width)
        rows, grads = (_fold(x, tile, heads, dtype) for x in (query, grad_out))
        gates, inner, _ = _weights(rows, keys, ends, groups, tile, scale)
        grad_weights = _times(grads, values[:, :, span].mT).unflatten(-1, (tile.blocks, -1))
        grad_values[:, :, span] += _sum_over(inner * gates[..., None], grads)
        # Per group: what its gate is worth.
        worth = (inner * grad_weights).sum(-1)
        delta = (gates * worth).sum(-1, keepdim=True)
        grad_total = _fold(grad_lse[..., None].to(dtype), tile, heads, dtype)
        grad_logits = gates * (worth - delta + grad_total)
        own = _own(groups, tile)
        grad_weights.sub_(worth[..., None]).mul_(gates[..., None]).add_((grad_logits * own)[..., None]).mul_(inner)
        grad_ends_part = grad_logits.masked_fill(own, 0) * scale
        grad_scores = grad_weights.flatten(-2) * scale
        part = _times(grad_scores, keys[:, :, span]) + _times(grad_ends_part, ends[:, :, : tile.blocks])
        grad_query[:, :, tile.start : tile.stop] = part.flatten(1, 2).to(query.dtype)
        grad_keys[:, :, span] += _sum_over(grad_scores, rows)
        grad_ends[:, :, : tile.blocks] += _sum_over(grad_ends_part, rows)
    places, landmarks = groups.places.flatten().clamp(min=0), groups.landmarks.clamp(min=0)
    grad_key.index_add_(2, places, grad_keys).index_add_(2, landmarks, grad_ends)
    grad_value.index_add_(2, places, grad_values)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _gather(key: Tensor, value: Tensor, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Regular keys and values `[B, H, n * w, D]` by block, and landmark keys `[B, H, n, D]`; 0 where there is none."""
    places, landmarks = groups.places.flatten(), groups.landmarks
    parts = []
    for tensor, where in ((key, places), (value, places), (key, landmarks)):
        found = tensor[:, :, where.clamp(min=0)].to(dtype)
        parts.append(found.masked_fill_((where < 0)[:, None], 0))
    return tuple(parts)


def _tiles(query: Tensor, groups: Groups) -> Iterator[_Tile]:
    """Tiles of query rows that see a key, each small enough for its scores."""
    block, width = groups.block.tolist(), groups.places.shape[1]
    heads = query.shape[0] * query.shape[1]
    start = sum(number < 0 for number in block)
    while start < len(block):
        row = max(heads * width * (block[-1] + 1), 1)
        stop = min(start + max(MAX_SCORES // row, MIN_ROWS), len(block))
        yield _Tile(start, stop, block[stop - 1] + 1, 0 if groups.ragged else block[start])
        start = stop


def _fold(tensor: Tensor, tile: _Tile, heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of a tile `[B, H, G, R, D]`, query heads beside the KV head they read."""
    return tensor[:, :, tile.start : tile.stop].to(dtype).unflatten(1, (heads, -1))


def _times(left: Tensor, right: Tensor) -> Tensor:
    """`[B, H, G, R, X] @ [B, H, X, Y]`."""
    group = left.shape[2]
    return (left.flatten(2, 3) @ right).unflatten(2, (group, -1))


def _sum_over(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum over query rows: `[B, H, G, R, ...]`, `[B, H, G, R, D]` -> `[B, H, ..., D]`."""
    weights = weights.flatten(4) if weights.dim() > 5 else weights
    return weights.flatten(2, 3).mT @ rows.flatten(2, 3)


def _own(groups: Groups, tile: _Tile) -> Tensor:
    """Bool `[R, blocks]`: the block a row lies in."""
    numbers = torch.arange(tile.blocks, device=groups.block.device)
    return groups.block[tile.start : tile.stop, None] == numbers


def _weights(
    rows: Tensor, keys: Tensor, ends: Tensor, groups: Groups, tile: _Tile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates `[..., R, blocks]`, weights inside the groups `[..., R, blocks, w]` and lse `[..., R]` of a tile."""
    width = groups.places.shape[1]
    inner = _times(rows, keys[:, :, : tile.blocks * width].mT).mul_(scale).unflatten(-1, (tile.blocks, width))
    own = _own(groups, tile)
    places = groups.places[tile.mixed : tile.blocks]
    position = torch.arange(tile.start, tile.stop, device=rows.device) + groups.offset
    hidden = (places < 0) | (own[:, tile.mixed :, None] & (places > position[:, None, None]))
    inner[..., tile.mixed :, :].masked_fill_(hidden, NEG_INF)
    top = inner.amax(-1, keepdim=True)
    top = torch.where(top == NEG_INF, 0, top)
    inner.sub_(top).exp_()
    sums = inner.sum(-1)
    filled = torch.where(sums == 0, 1, sums)
    inner.div_(filled[..., None])

    logits = _times(rows, ends[:, :, : tile.blocks].mT).mul_(scale)
    numbers = torch.arange(tile.blocks, device=rows.device)
    seen = (numbers < groups.block[tile.start : tile.stop, None]) & (groups.landmarks[: tile.blocks] >= 0)
    logits = torch.where(seen, logits, NEG_INF)
    inside = torch.where(sums == 0, NEG_INF, top.squeeze(-1) + filled.log())
    logits = torch.where(own, inside, logits)
    highest = logits.amax(-1, keepdim=True)
    highest = torch.where(highest == NEG_INF, 0, highest)
    gates = (logits - highest).exp()
    total = gates.sum(-1, keepdim=True)
    some = torch.where(total == 0, 1, total)
    lse = torch.where(total == 0, NEG_INF, highest + some.log()).squeeze(-1)
    return gates / some, inner, lse
