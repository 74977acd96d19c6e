"""Paged decode attention in plain torch: copies the listed pages into a small workspace and multiplies there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pages import Pages

# Lists of the query heads of a KV head are copied as one where that is at most this share of copying all of them.
SHARED = 0.75
# Numbers of one gathered piece: small enough for a core's own cache, large enough that calls cost little beside it.
PIECE = 1 << 17


def paged_attention(
    query: Tensor,
    key: Pages,
    value: Pages,
    pages: Tensor,
    length: Tensor,
    scale: float,
    current: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """softmax(scale * q.k) v over the tokens of the listed pages, one query a row, fp32 inside (fp64 for fp64).

    Args:
        query: `[B, Hq, D]`.
        key, value: pages of `[B, H, n, P, D]` and `[B, H, n, P, Dv]`.
        pages: int64 `[B, H | Hq, W]`, -1 padded, no page twice.
        length: int64 `[B]`: tokens from here on are not read.
        current: the newest token (number `length - 1`) as it was before quantisation, `[B, H, D]` and `[B, H, Dv]`.
        slots: int64 `[B, n, P]`, the token in every place (-1: none); None: in order. With `current`, no place is read
            for the newest token: it takes part in any case.
        window: (sinks, recent): of the tokens only the first `sinks` and the last `recent` are read.

    Returns `[B, Hq, Dv]` in the query's dtype; 0 for rows without a token.
    """
    heads, device = key.data.shape[1], pages.device
    plain = slots is None and window is None
    if plain and pages.shape[1] > heads and device.type == "cpu" and not torch.compiler.is_compiling():
        merged, member = merged_lists(pages, heads, key.data.shape[2])
        if merged.shape[2] <= SHARED * pages.shape[2] * (pages.shape[1] // heads):
            out = _attend(query, key, value, merged, member, length, scale, current, None, None)
            # A page that one head reads and another does not must not reach the other, whatever it holds.
            if bool(out.isfinite().all()):
                return out
    return _attend(query, key, value, pages, None, length, scale, current, slots, window)


def merged_lists(pages: Tensor, heads: int, count: int) -> tuple[Tensor, Tensor]:
    """One list a KV head with the pages of all its query heads, in order: `[B, H, U]`, -1 padded, and which of them a
    query head reads, bool `[B, Hq, U]`."""
    batch, q_heads, _ = pages.shape
    table = torch.zeros(batch, q_heads, count + 1, dtype=torch.bool, device=pages.device)
    table.scatter_(2, torch.where(pages >= 0, pages, count), True)
    table = table[..., :count].unflatten(1, (heads, -1))
    needed = table.any(2)
    total = needed.sum(-1, keepdim=True)
    width = int(total.max())
    order = (~needed).to(torch.int8).sort(dim=-1, stable=True).indices[..., :width]
    real = torch.arange(width, device=pages.device) < total
    member = table.gather(3, order[:, :, None].expand(-1, -1, table.shape[2], -1)) & real[:, :, None]
    return torch.where(real, order, -1), member.flatten(1, 2)


def _attend(
    query: Tensor,
    key: Pages,
    value: Pages,
    pages: Tensor,
    member: Tensor | None,
    length: Tensor,
    scale: float,
    current: tuple[Tensor, Tensor] | None,
    slots: Tensor | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """`paged_attention` over lists that may hold more than a query head reads: `member`, bool `[B, Hq, W]`."""
    batch, q_heads, _ = query.shape
    lists, size, width = pages.shape[1], key.page_size, pages.shape[2]
    rows = q_heads // lists
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    seen, newest = _tokens(pages, length, size, current is not None, slots, window)
    # Fill gaps with a page that is read anyway: any other may hold anything.
    filled = torch.where(pages >= 0, pages, pages.amax(-1, keepdim=True).clamp(min=0))
    head = torch.arange(lists, device=pages.device) * key.data.shape[1] // lists
    first = (torch.arange(batch, device=pages.device)[:, None] * key.data.shape[1] + head) * key.data.shape[2]
    table = (filled + first[..., None]).flatten(0, 1)  # [B * lists, W] rows of the page tables

    if member is not None:
        seen = seen & member.reshape(batch * lists, rows, width, 1).expand(-1, -1, -1, size).flatten(2)

    vectors = (query.to(dtype) * scale).reshape(batch * lists, rows, -1)
    scores = torch.empty(batch * lists, rows, seen.shape[2], dtype=dtype, device=query.device)
    for at, columns, part in _pieces(key, table, dtype):
        part.scores(vectors[at], scores[at, :, columns])
    if current is not None:
        newest = newest & seen
        own = (vectors.view(batch, lists, rows, -1) * _of_lists(current[0], lists, dtype)).sum(-1)
        scores = torch.where(newest, own.reshape(batch * lists, rows, 1), scores)
    scores.masked_fill_(~seen, float("-inf"))
    weights = torch.softmax(scores, -1)
    out = torch.zeros(batch * lists, rows, value.head_dim, dtype=dtype, device=query.device)
    if current is not None:
        own = (weights * newest).sum(-1, keepdim=True)
        out += own * _of_lists(current[1], lists, dtype).reshape(batch * lists, 1, -1)
        weights = weights.masked_fill(newest, 0.0)
    for at, columns, part in _pieces(value, table, dtype):
        part.add_weighted(weights[at, :, columns], out[at])
    return out.masked_fill_(~seen.any(-1, keepdim=True), 0.0).view(batch, q_heads, -1).to(query.dtype)


def _tokens(
    pages: Tensor, length: Tensor, size: int, current: bool, slots: Tensor | None, window: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    """Which tokens of the lists are read, bool `[B * lists, 1, T]`, and which one is the newest if it is given apart.

    T is the width of the lists times the page size, and one more for a newest token that no page holds.
    """
    end = length[:, None, None, None]
    token = pages[..., None] * size + torch.arange(size, device=pages.device)
    if slots is not None:
        token = slots[torch.arange(len(length), device=pages.device)[:, None, None], pages.clamp(min=0)]
    listed = (pages >= 0)[..., None]
    seen = listed & (token >= 0) & (token < end)
    if window is not None:
        seen &= (token < window[0]) | (token >= end - window[1])
    newest = listed & (token == end - 1) if current else None
    if current and slots is not None:
        own = (length > 0)[:, None, None].expand(-1, pages.shape[1], 1)
        seen = torch.cat([(seen & ~newest).flatten(2), own], 2)
        newest = torch.cat([torch.zeros_like(newest).flatten(2), torch.ones_like(own)], 2)
    return tuple(x if x is None else x.flatten(2).flatten(0, 1)[:, None] for x in (seen, newest))


def _of_lists(x: Tensor, lists: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, D]` of the KV heads as `[B, lists, 1, D]`."""
    return x.to(dtype).repeat_interleave(lists // x.shape[1], 1)[:, :, None]


class _Part:
    """Gathered pages of some lists: `[n, tokens, D]`, floating or as codes that are never dequantised one by one.

    With codes, q.(s (c - z)) = s (q.c - z sum(q)) and sum_i w_i s_i (c_i - z_i) = (w s).c - (w s).z.
    """

    def __init__(self, data: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int | None, dtype: torch.dtype):
        self.scale = None if scale is None else scale.to(dtype)
        self.zero = None if zero is None else zero.to(dtype)
        halves = (data & 15, data >> 4) if bits == 4 else (data,)
        self.halves = [half.to(dtype) for half in halves]

    def scores(self, query: Tensor, out: Tensor) -> None:
        """out `[n, rows, tokens]` = q.k."""
        if self.scale is None:
            torch.bmm(query, self.halves[0].mT, out=out)
            return
        if len(self.halves) == 2:
            product = torch.bmm(query[..., 0::2], self.halves[0].mT)
            product.baddbmm_(query[..., 1::2], self.halves[1].mT)
        else:
            product = torch.bmm(query, self.halves[0].mT)
        if self.zero is not None:
            product -= self.zero * query.sum(-1, keepdim=True)
        torch.mul(product, self.scale, out=out)

    def add_weighted(self, weights: Tensor, out: Tensor) -> None:
        """out `[n, rows, D]` += weights.v."""
        if self.scale is None:
            out.baddbmm_(weights, self.halves[0])
            return
        weights = weights * self.scale
        if self.zero is not None:
            out -= (weights * self.zero).sum(-1, keepdim=True)
        if len(self.halves) == 2:
            out[..., 0::2] += torch.bmm(weights, self.halves[0])
            out[..., 1::2] += torch.bmm(weights, self.halves[1])
        else:
            out.baddbmm_(weights, self.halves[0])


def _pieces(source: Pages, table: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, _Part]]:
    """Cut the lists `[L, W]` of table rows into pieces that fit the workspace: whole lists, or parts of one."""
    size, width = source.page_size, table.shape[1]
    page = size * source.data.shape[4]
    data = source.data.reshape(-1, page)
    scale = source.scale if source.scale is None or source.scale.dim() == 0 else source.scale.reshape(-1, size)
    zero = None if source.zero is None else source.zero.reshape(-1, size)
    per_piece = max(PIECE // page, 1)
    lists = max(per_piece // max(width, 1), 1)
    step = width if lists > 1 else min(per_piece, width)
    work = data.new_empty(min(lists, table.shape[0]) * step, page)
    for row in range(0, table.shape[0], lists):
        for column in range(0, width, step):
            picked = table[row : row + lists, column : column + step]
            count, flat = picked.shape[0], picked.reshape(-1)
            got = torch.index_select(data, 0, flat, out=work[: flat.numel()]).view(count, -1, source.data.shape[4])
            scales = scale if scale is None or scale.dim() == 0 else scale[flat].view(count, 1, -1)
            zeros = None if zero is None else zero[flat].view(count, 1, -1)
            columns = slice(column * size, min(column + step, width) * size)
            yield slice(row, row + count), columns, _Part(got, scales, zeros, source.bits, dtype)
