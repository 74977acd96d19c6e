"""Head-routed attention by the compiled CPU kernel: a tile is chosen rows of one KV head, of rising positions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..native import Rows, Segments, attend
from ..native.plans import Tiles, careful, ranges

# Keys of a segment; a tile reads whole ones, and short ones leave fewer hidden. Longer rows have longer ones, so that
# lists stay short.
SEGMENT, MOST_SEGMENTS = 32, 128


def forward(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As `torch_path.forward`, without a choice of dense."""
    batch, count, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    out = query.new_empty(batch, q_len, count, value.shape[3])
    lse = torch.full((batch, q_len, count), float("-inf"))
    seen = heads
    if causal and q_len > k_len:
        seen = heads.clone()
        seen[:, :, : q_len - k_len] = False
    out.view(-1, value.shape[3]).index_fill_(0, (~seen).transpose(1, 2).flatten().nonzero()[:, 0], 0)
    # Rows of a KV head by position, then by head: 32 in turn, which the kernel takes together, are close neighbours.
    entry, kv_head, row, member = seen.unflatten(1, (kv_heads, -1)).transpose(2, 3).nonzero().unbind(1)
    head = kv_head * (count // kv_heads) + member
    offsets = entry * query.stride(0) + head * query.stride(1) + row * query.stride(2)
    if not len(row):
        return out.transpose(1, 2), lse.transpose(1, 2).contiguous()
    tiles = Tiles.cut((entry * kv_heads + kv_head).bincount(minlength=batch * kv_heads))
    last = (row + k_len - q_len).int() if causal else None
    rows = Rows(
        tiles.starts, offsets, (entry * q_len + row) * count + head, torch.ones_like(row, dtype=torch.int32), last
    )
    length = max(SEGMENT, -(-k_len // (MOST_SEGMENTS * SEGMENT)) * SEGMENT)
    segments = _segments(key, value, length)
    per_head = -(-k_len // length)
    needed = last[tiles.last] // length + 1 if causal else torch.full_like(tiles.owners, per_head)
    lists = ranges((tiles.owners * per_head)[:, None], needed.long()[:, None])
    if not attend(query, key, value, rows, segments, lists, scale, out, lse):
        _repair(query, key, value, causal, scale, out, lse)
    return out.transpose(1, 2), lse.transpose(1, 2).contiguous()


def _segments(key: Tensor, value: Tensor, length: int) -> Segments:
    """All keys of all KV heads."""
    begin = torch.arange(0, key.shape[2], length)
    batch, head = torch.arange(key.shape[0])[:, None, None], torch.arange(key.shape[1])[:, None]
    keys, values = ((batch * x.stride(0) + head * x.stride(1) + begin * x.stride(2)).flatten() for x in (key, value))
    low = begin.int().repeat(key.shape[0] * key.shape[1])
    lengths = (key.shape[2] - low).clamp(max=length)
    return Segments(keys, values, lengths, low, low + lengths - 1)


def _repair(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, out: Tensor, lse: Tensor) -> None:
    """Rows that are not finite again, in place; out, lse: `[B, Nq, Hq, ...]`."""
    group, shift = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    bad = (~out.isfinite()).any(-1)
    for entry, kv_head in bad.unflatten(2, (-1, group)).any(3).any(1).nonzero().tolist():
        own = slice(kv_head * group, (kv_head + 1) * group)
        row, head = bad[entry, :, own].nonzero().unbind(1)
        last = (row + shift if causal else torch.full_like(row, key.shape[2]))[:, None]
        tensors = query[entry, own][head, row], key[entry, kv_head], value[entry, kv_head]
        again = careful(*tensors, partial(_visible, last, key.shape[2]), scale)
        for into, some in zip((out, lse), again, strict=True):
            into[entry, :, own][row, head] = some


def _visible(last: Tensor, k_len: int, rows: slice) -> Tensor:
    return torch.arange(k_len) <= last[rows]
