"""Chosen pages side by side, for the steps that read the same ones: copied and dequantised once."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .pages import Pages


class KeptPages:
    """A copy of chosen pages, and behind them of the newest pages, which new tokens fill.

    `choose` moves it from one choice to the next and copies what is not there yet: most pages stay. The lists of the
    query heads of a KV head share one copy, with an additive mask that says which head reads what. Numbers are fp32
    (fp64 for fp64 queries); quantised pages are dequantised. 4-bit keys and values lie with their even channels first,
    and the query is brought into that order.

    Args:
        q_heads: query heads.
        dtype: of the copies.
    """

    def __init__(self, q_heads: int, dtype: torch.dtype) -> None:
        self.q_heads, self.dtype = q_heads, dtype
        self.pages: Tensor | None = None
        self.key = self.value = self.mask = None
        # Page in every place of every row and KV head, -1 for none; only pages that never change again.
        self._held: list[list[int]] = []
        self.start = self.before = self.end = 0
        # Tokens from here on have not been put yet.
        self.next = 0
        # The newest token, where what stands here is not what the storage gives.
        self.exact: int | None = None
        self._even_first = False

    def choose(self, key: Pages, value: Pages, pages: Tensor, first: int, room: int, tokens: int) -> None:
        """Hold the listed pages, and the tokens from page `first` on that the storage has.

        Args:
            key, value: storage of `[B, H, n, P, D]` and `[B, H, n, P, Dv]`, contiguous.
            pages: int64 `[B, H | Hq, W]`, -1 padded, none of them from `first` on.
            first: a page; all tokens from its first one on are read too.
            room: pages from `first` on to keep place for, >= 1.
            tokens: in storage.
        """
        batch, heads, count, size = key.data.shape[:4]
        self._even_first = key.bits == 4
        lists = [[{p for p in one if p >= 0} for one in row] for row in pages.tolist()]
        group = len(lists[0]) // heads
        needed = [set().union(*row[h * group : (h + 1) * group]) for row in lists for h in range(heads)]
        width = max(map(len, needed))
        self._allocate(key, value, width + room)
        capacity = self._room
        moves = [(at * capacity + to, at * count + page) for at, page, to in self._placed(needed, width)]
        newest = min(-(-tokens // size), first + room)
        for at in range(batch * heads):
            moves += [(at * capacity + width + page - first, at * count + page) for page in range(first, newest)]
        if moves:
            table = torch.tensor(moves, device=pages.device).T
            for stored, into in ((key, self.key), (value, self.value)):
                into.view(-1, size * into.shape[3]).index_copy_(0, table[0], _numbers(stored, table[1], self.dtype))
        self.pages, self.next, self.exact = pages, tokens, None
        self.start, self.before, self.end = first * size, width * size, (first + room) * size
        self.mask = self._hidden(lists, width, room, size)

    def _placed(self, needed: list[set[int]], width: int) -> list[tuple[int, int, int]]:
        """Give every needed page a place below `width`; (row, page, place) of those that must be copied there."""
        moves = []
        for at, (held, pages) in enumerate(zip(self._held, needed, strict=True)):
            for place in range(width, len(held)):
                held[place] = -1
            missing = pages.difference(held)
            free = (place for place, page in enumerate(held) if page not in pages)
            for page, place in zip(sorted(missing), free, strict=False):
                held[place] = page
                moves.append((at, page, place))
        return moves

    def _allocate(self, key: Pages, value: Pages, room: int) -> None:
        """Memory for `room` pages of every row and head; all pages are forgotten when it is new."""
        batch, heads, _, size, _ = key.data.shape
        shape = (batch, heads, size, key.head_dim, value.head_dim)
        if self.key is not None and self._shape == shape and self._room >= room:
            return
        self._shape, self._room = shape, room + max(room // 8, 2)
        self._held = [[-1] * self._room for _ in range(batch * heads)]
        # Zeros: a place that no head reads must not hold what is not a number.
        self.key, self.value = (
            torch.zeros(batch, heads, self._room * size, x.head_dim, dtype=self.dtype, device=x.data.device)
            for x in (key, value)
        )

    def _hidden(self, lists: list[list[set[int]]], width: int, room: int, size: int) -> Tensor | None:
        """The additive mask `[B, H, Hq / H, tokens]` of what a query head does not read; None when that is nothing."""
        batch, heads = self.key.shape[:2]
        group, rows = len(lists[0]) // heads, [one for row in lists for one in row]
        if all(len(one) == width for one in rows):
            return None
        read = bytearray()
        for number, one in enumerate(rows):
            read += bytes([page in one for page in self._held[number // group][:width]])
            read += b"\1" * room
        flags = torch.frombuffer(read, dtype=torch.bool).view(batch, heads, group, width + room, 1)
        mask = torch.zeros(flags.shape, dtype=self.dtype).masked_fill_(~flags, -math.inf).to(self.key.device)
        return mask.expand(-1, -1, self.q_heads // heads, -1, size).flatten(3)

    def cut(self, tokens: int) -> None:
        """The storage has `tokens` tokens from now on: what came behind them, and pages they do not fill, go."""
        if self.key is None:
            return
        full = tokens // self._shape[2]
        self._held = [[page if page < full else -1 for page in held] for held in self._held]
        self.next = min(self.next, tokens)
        if self.exact is not None and self.exact >= tokens:
            self.exact = None

    def put(self, number: int, key: Tensor, value: Tensor) -> None:
        """Token `number`, `[B, H, 1, D]` and `[B, H, 1, Dv]`, at its place."""
        at = self.before + number - self.start
        if self._even_first:
            key, value = even_first(key), even_first(value)
        self.key.narrow(2, at, 1).copy_(key)
        self.value.narrow(2, at, 1).copy_(value)
        self.next = max(self.next, number + 1)

    def attend(self, query: Tensor, number: int, scale: float) -> Tensor | None:
        """softmax(scale * q.k) v over the chosen pages and all tokens from the first one behind them up to `number`.

        Args:
            query: `[B, Hq, 1, D]`.

        Returns `[B, Hq, 1, Dv]` in the query's dtype; None when what another head alone reads is not finite and reached
        this one.
        """
        batch, heads, _, dim = self.key.shape
        width = self.before + number - self.start + 1
        vectors = query.to(self.dtype).view(batch, heads, -1, dim)
        if self._even_first:
            vectors = even_first(vectors)
        mask = None if self.mask is None else self.mask.narrow(3, 0, width)
        key, value = self.key.narrow(2, 0, width), self.value.narrow(2, 0, width)
        out = scaled_dot_product_attention(vectors, key, value, attn_mask=mask, scale=scale)
        # A sum is enough: should it overflow, the general step gives the same result.
        if mask is not None and not math.isfinite(out.sum().item()):
            return None
        if self._even_first:
            out = torch.stack(out.chunk(2, -1), -1).flatten(-2)
        return out.view(batch, query.shape[1], 1, -1).to(query.dtype)

    def bytes(self) -> int:
        """Bytes of the copies and the mask."""
        held = [t for t in (self.key, self.value, self.mask) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in held)


def even_first(x: Tensor) -> Tensor:
    """Channels `[..., D]` in the order of 4-bit codes: all even ones, then all odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def _numbers(source: Pages, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the page table as numbers, `[n, P * D]`."""
    size, dim, count = source.page_size, source.head_dim, rows.numel()
    picked = source.data.view(-1, size * source.data.shape[4]).index_select(0, rows)
    if source.bits is None:
        return picked.to(dtype)
    picked = picked.view(count, size, -1)
    if source.bits == 4:
        picked = torch.cat([picked & 15, picked >> 4], -1)
    out = picked.to(dtype)
    if source.zero is not None:
        out.sub_(source.zero.view(-1, size).index_select(0, rows).to(dtype)[..., None])
    if source.scale is not None:
        whole = source.scale.dim() == 0
        scale = source.scale if whole else source.scale.view(-1, size).index_select(0, rows)[..., None]
        out.mul_(scale.to(dtype))
    return out.view(count, size * dim)
