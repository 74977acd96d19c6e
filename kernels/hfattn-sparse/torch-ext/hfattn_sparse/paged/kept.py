"""Chosen pages side by side, for the steps that read the same ones: copied and dequantised once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .pages import Pages
from .torch_path import merged_lists


class KeptPages:
    """A copy of the listed pages, and behind them of the pages from `first` on, which new tokens fill.

    The lists of the query heads of a KV head are copied as one, with an additive mask that says which head reads what.
    Numbers are fp32 (fp64 for fp64 queries); quantised pages are dequantised. 4-bit keys and values lie with their even
    channels first, and the query is brought into that order.

    Args:
        key, value: storage of `[B, H, n, P, D]` and `[B, H, n, P, Dv]`, contiguous.
        pages: int64 `[B, H | Hq, W]`, -1 padded, none of them from `first` on.
        first: a page; all tokens from its first one on are read too.
        room: pages from `first` on to keep place for, >= 1.
        q_heads: query heads.
        dtype: of the copies.
        old: an earlier object whose memory is taken; it is of no use afterwards.
    """

    def __init__(
        self,
        key: Pages,
        value: Pages,
        pages: Tensor,
        first: int,
        room: int,
        q_heads: int,
        dtype: torch.dtype,
        old: KeptPages | None = None,
    ) -> None:
        batch, heads, count, size = key.data.shape[:4]
        self.pages, self.bits = pages, key.bits
        # The newest token, where what stands here is not what the storage gives.
        self.exact: int | None = None
        group = q_heads // heads
        merged, member = (pages, None) if pages.shape[1] == heads else merged_lists(pages, heads, count)
        width = merged.shape[2]
        self.start, self.before = first * size, width * size
        # A gap repeats a page that is read anyway: any other may hold anything.
        filled = torch.where(merged >= 0, merged, first)
        # Places behind the allocated pages are written before they are read.
        tail = torch.arange(first, first + room, device=pages.device).clamp(max=count - 1)
        table = torch.cat([filled, tail.expand(batch, heads, -1)], 2)
        rows = (table + torch.arange(batch * heads, device=pages.device).view(batch, heads, 1) * count).flatten()
        self._memory = [
            _memory(rows.numel() * size * stored.head_dim, dtype, rows.device, None if old is None else old._memory[i])
            for i, stored in enumerate((key, value))
        ]
        self.key, self.value = (
            _copied(stored, rows, memory).view(batch, heads, (width + room) * size, stored.head_dim)
            for stored, memory in zip((key, value), self._memory, strict=True)
        )
        gaps = None if member is not None else merged < 0
        self.mask = None
        if member is not None or bool(gaps.any()):
            hidden = ~member.unflatten(1, (heads, group)) if member is not None else gaps[:, :, None]
            mask = torch.zeros(batch, heads, hidden.shape[2], width + room, size, dtype=dtype, device=pages.device)
            mask[:, :, :, :width].masked_fill_(hidden[..., None], float("-inf"))
            self.mask = mask.flatten(3).expand(-1, -1, group, -1)

    @property
    def end(self) -> int:
        """Token numbers from here on have no place."""
        return self.start + self.key.shape[2] - self.before

    def put(self, number: int, key: Tensor, value: Tensor) -> None:
        """Token `number`, `[B, H, 1, D]` and `[B, H, 1, Dv]`, at its place."""
        at = self.before + number - self.start
        for into, token in ((self.key, key), (self.value, value)):
            into.narrow(2, at, 1).copy_(even_first(token) if self.bits == 4 else token)

    def attend(self, query: Tensor, number: int, scale: float) -> Tensor | None:
        """softmax(scale * q.k) v over the listed pages and all tokens from the first one behind them up to `number`.

        Args:
            query: `[B, Hq, D]`.

        Returns `[B, Hq, Dv]` in the query's dtype; None when what another head alone reads is not finite and reached
        this one.
        """
        batch, heads, _, dim = self.key.shape
        width = self.before + number - self.start + 1
        vectors = query.to(self.key.dtype).view(batch, heads, -1, dim)
        if self.bits == 4:
            vectors = even_first(vectors)
        mask = None if self.mask is None else self.mask.narrow(3, 0, width)
        key, value = self.key.narrow(2, 0, width), self.value.narrow(2, 0, width)
        out = scaled_dot_product_attention(vectors, key, value, attn_mask=mask, scale=scale)
        if mask is not None and not bool(out.isfinite().all()):
            return None
        if self.bits == 4:
            out = torch.stack(out.chunk(2, -1), -1).flatten(-2)
        return out.view(batch, query.shape[1], -1).to(query.dtype)

    def bytes(self) -> int:
        """Bytes of the copies and the mask."""
        held = self._memory if self.mask is None else [*self._memory, self.mask]
        return sum(t.untyped_storage().nbytes() for t in held)


def even_first(x: Tensor) -> Tensor:
    """Channels `[..., D]` in the order of 4-bit codes: all even ones, then all odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def _memory(numbers: int, dtype: torch.dtype, device: torch.device, old: Tensor | None) -> Tensor:
    """`old` where it is large enough, else new memory with some room: unions of lists differ in length."""
    if old is not None and old.dtype == dtype and old.device == device and old.numel() >= numbers:
        return old
    return torch.empty(numbers + numbers // 8, dtype=dtype, device=device)


def _copied(source: Pages, rows: Tensor, memory: Tensor) -> Tensor:
    """Rows of the page table `[n, P * D]` as numbers, at the start of `memory`."""
    size, dim, count = source.page_size, source.head_dim, rows.numel()
    data = source.data.reshape(-1, size * source.data.shape[4])
    out = memory[: count * size * dim]
    if source.bits is None and data.dtype == memory.dtype:
        return torch.index_select(data, 0, rows, out=out.view(count, -1))
    picked = data.index_select(0, rows).view(count, size, -1)
    out = out.view(count, size, dim)
    if source.bits == 4:
        low, high = out.chunk(2, -1)
        low.copy_(picked & 15)
        high.copy_(picked >> 4)
    else:
        out.copy_(picked)
    if source.zero is not None:
        out.sub_(source.zero.reshape(-1, size).index_select(0, rows).to(out.dtype)[..., None])
    if source.scale is not None:
        whole = source.scale.dim() == 0
        scale = source.scale if whole else source.scale.reshape(-1, size).index_select(0, rows)[..., None]
        out.mul_(scale.to(out.dtype))
    return out
