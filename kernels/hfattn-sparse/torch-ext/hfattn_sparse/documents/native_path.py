"""Attention of a prompt of documents by the compiled CPU kernel: causal by slot throughout, lists say who sees whom."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import Lists, Rows, Segments, attend
from ..native.plans import Tiles, careful, ranges
from .reference import visible

# Keys of a segment at most: short ones leave fewer hidden, and matrix units take 32 at a time.
SEGMENT = 32
# The number of the reader in `Slots.owners`, behind that of every document; the prefix is 0.
_READER = 1 << 40


def forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """As `torch_path.forward`."""
    padded = bool((table[:, 0] < 0).any())
    out = (query.new_zeros if padded else query.new_empty)(*query.shape[:3], value.shape[3])
    lse = torch.empty(query.shape[1:3])
    for entry in range(len(table)):
        slots = Slots.of(table[entry], SEGMENT)
        if not len(slots.at):
            continue
        tensors = query[entry], key[entry], value[entry]
        if not _attend(slots, *tensors, scale, out[entry], lse):
            _repair(table[entry : entry + 1], *tensors, scale, out[entry])
    return out


class Slots(NamedTuple):
    """The real slots of a row by owner: prefix, documents, reader; in pieces of consecutive ones.

    at: int64 `[R]`; owners: int64 `[owners]`, ascending; counts: slots of each; pieces: piece of each slot; low,
    lengths: int64 `[S]`, first slot and number of slots of a piece; first: int64 `[owners + 1]`, pieces of each owner.
    """

    at: Tensor
    owners: Tensor
    counts: Tensor
    pieces: Tensor
    low: Tensor
    lengths: Tensor
    first: Tensor

    @classmethod
    def of(cls, table: Tensor, most: int) -> Slots:
        """table: `[3, N]` as in the reference; most: slots of a piece."""
        segments, _, roles = table
        owner = torch.where(roles == 1, segments.long() + 1, (roles == 2) * _READER)
        at = (segments >= 0).nonzero()[:, 0]
        at = at[owner[at].argsort(stable=True)]
        owners, owner, counts = owner[at].unique_consecutive(return_inverse=True, return_counts=True)
        count = torch.arange(len(at))
        new = torch.ones(len(at), dtype=torch.bool)
        new[1:] = (at.diff() != 1) | (owner.diff() != 0)
        new |= (count - torch.where(new, count, 0).cummax(0)[0]) % most == 0
        begin = new.nonzero()[:, 0]
        lengths = torch.cat([begin, begin.new_tensor([len(at)])]).diff()
        first = torch.searchsorted(owner[begin], torch.arange(len(owners) + 1))
        return cls(at, owners, counts, new.cumsum(0) - 1, at[begin], lengths, first)


def _attend(slots: Slots, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, lse: Tensor) -> bool:
    """One batch row; returns whether its results are finite."""
    heads, kv_heads = query.shape[0], key.shape[0]
    group, kv_head = heads // kv_heads, torch.arange(kv_heads)[:, None]
    # Rows of a KV head by slot, then by head: 32 in turn, which the kernel takes together, are close neighbours.
    head = torch.arange(heads).view(kv_heads, 1, group)
    offsets = (slots.at[:, None] * query.stride(1) + head * query.stride(0)).flatten()
    numbers = (slots.at[:, None] + head * query.shape[1]).flatten()
    positions = slots.at.int().repeat_interleave(group).repeat(kv_heads)
    tiles, count = Tiles.cut(slots.counts * group), len(slots.at) * group
    starts = (tiles.starts[:-1] + kv_head * count).flatten()
    starts = torch.cat([starts, starts.new_tensor([count * kv_heads])])
    rows = Rows(starts, offsets, numbers, torch.ones_like(numbers, dtype=torch.int32), positions)
    keys, values = ((kv_head * x.stride(0) + slots.low * x.stride(1)).flatten() for x in (key, value))
    low, lengths = (x.int().repeat(kv_heads) for x in (slots.low, slots.lengths))
    segments = Segments(keys, values, lengths, low, low + lengths - 1)
    return attend(query, key, value, rows, segments, _lists(slots, tiles, group, kv_heads), scale, out, lse)


def _lists(slots: Slots, tiles: Tiles, group: int, kv_heads: int) -> Lists:
    """Documents read the prefix and their own pieces as far as their last row, the reader everything before its own."""
    owner, first = slots.owners[tiles.owners], slots.first[tiles.owners]
    prefix = slots.first[1] if int(slots.owners[0]) == 0 else 0
    others = torch.where(owner == _READER, first, torch.where(owner == 0, 0, prefix))
    own = slots.pieces[tiles.last // group] + 1 - first
    begin = torch.stack([torch.zeros_like(first), first], 1) + (torch.arange(kv_heads) * len(slots.low))[:, None, None]
    return ranges(begin.flatten(0, 1), torch.stack([others, own], 1).repeat(kv_heads, 1))


def _repair(table: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
    """Rows `[Hq, N, Dv]` that are not finite again, in place."""
    group = query.shape[0] // key.shape[0]
    bad = (~out.isfinite()).any(-1)
    for kv_head in range(key.shape[0]):
        own = slice(kv_head * group, (kv_head + 1) * group)
        head, slot = bad[own].nonzero().unbind(1)
        if len(slot):
            tensors = query[own][head, slot], key[kv_head], value[kv_head]
            out[own][head, slot], _ = careful(*tensors, partial(_visible, table, slot), scale)


def _visible(table: Tensor, slots: Tensor, rows: slice) -> Tensor:
    return visible(table, slots[rows])[0, 0]
