"""Pages of keys and values with key statistics, growing in steps; rows may have unequal lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.caches.quantization import KVFormat
from hf_attn.caches.store import outliving
from hf_attn.ops.hfattn_sparse.paged.pages import Pages
from hf_attn.ops.hfattn_sparse.paged.statistics import empty_statistics, update_statistics

# Pages are allocated ahead in this share of those held: a growing cache is copied now and then, not in every step.
GROWTH, MIN_GROWTH = 8, 4


class PagedKV:
    """Keys and values `[B, H, capacity, P, D]`, statistics `[B, H, capacity, G, 2, D]`.

    Tokens of a row are numbered from its first real one, so pages never hold padding.

    Args:
        page_size, logical_page_size: tokens; the first is a multiple of the second.
        format: how keys and values are stored.
        stats_dtype: of the statistics; None takes the keys' dtype.
    """

    def __init__(
        self, page_size: int, logical_page_size: int, format: KVFormat, stats_dtype: torch.dtype | None = None
    ) -> None:
        self.page_size, self.logical_page_size = page_size, logical_page_size
        self.format, self.stats_dtype = format, stats_dtype
        self.key: Pages | None = None
        self.value: Pages | None = None
        self._stats: Tensor | None = None
        self.lengths: list[int] = []
        # Newest tokens that the statistics do not know yet; the same number in all rows, which are equally long.
        self._unpooled = 0
        self._flat: tuple[Pages, tuple[Tensor, Tensor]] | None = None

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Pages allocated for every row and head."""
        return 0 if self.key is None else self.key.data.shape[2]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def equal_rows(self) -> bool:
        return len(set(self.lengths)) <= 1

    @property
    def stats(self) -> Tensor:
        """Key statistics of the tokens that count, `[B, H, capacity, G, 2, D]`, once there are pages."""
        stats = self._stats
        assert stats is not None
        if self._unpooled:
            stop = self.lengths[0]
            start, self._unpooled = stop - self._unpooled, 0
            keys = self.flat[0][:, :, start:stop]
            update_statistics(stats.flatten(2, 3), keys, start, self.logical_page_size)
        return stats

    @property
    def _pages(self) -> tuple[Pages, Pages]:
        """Keys and values, once there are pages."""
        assert self.key is not None and self.value is not None
        return self.key, self.value

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values of floating pages as rows of tokens, `[B, H, capacity * P, D]`: views."""
        if self._flat is None or self._flat[0] is not self.key:
            key, value = self._pages
            self._flat = key, (key.data.flatten(2, 3), value.data.flatten(2, 3))
        return self._flat[1]

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, key: Tensor, value: Tensor, counts: list[int], scales: tuple[Tensor, Tensor] | None) -> None:
        """Store tokens behind those that count, without counting them yet (`advance` does).

        Args:
            key, value: `[B, H, n, D]`, `[B, H, n, Dv]`; row b's first `counts[b]` tokens are stored.
            scales: of the layer, for "int8-per-tensor".
        """
        if self.key is None:
            self.lengths = [0] * key.shape[0]
        self._grow(max(n + c for n, c in zip(self.lengths, counts, strict=True)), key, value, scales)
        for target, source in zip(self._pages, (key, value), strict=True):
            encoded = self.format.encode(source, None if scales is None else scales[0 if source is key else 1])
            tensors = [(target.data, encoded.data)]
            if target.zero is not None:
                tensors += [(target.scale, encoded.scale), (target.zero, encoded.zero)]
            for into, tokens in tensors:
                self._put(into.flatten(2, 3), tokens[:, :, 0], counts)

    def write_one(self, number: int, key: Tensor, value: Tensor, scales: tuple[Tensor, Tensor] | None) -> None:
        """`write` of token `number` of every row, which are equally long: `[B, H, 1, D]`, with few calls."""
        if self.key is None or self.format.name is not None:
            self.write(key, value, [1] * key.shape[0], scales)
            return
        if number >= self.capacity * self.page_size:
            self._grow(number + 1, key, value, scales)
        keys, values = self.flat
        keys.narrow(2, number, 1).copy_(key)
        values.narrow(2, number, 1).copy_(value)

    def advance_one(self, key: Tensor) -> None:
        """`advance` of one token of every row, which are equally long."""
        if self.format.name is not None:
            self.advance(key, [1] * key.shape[0])
            return
        # Looked up when pages are chosen: unquantised keys are there to be read.
        self._unpooled += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _put(self, into: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """Tokens `[B, H, n, ...]` into `[B, H, capacity * P, ...]` behind each row's length."""
        if self.equal_rows and len(set(counts)) == 1:
            start = self.lengths[0]
            into[:, :, start : start + counts[0]] = tokens[:, :, : counts[0]]
            return
        for row, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            into[row, :, start : start + count] = tokens[row, :, :count]

    def advance(self, key: Tensor, counts: list[int]) -> None:
        """Count the tokens written last, and take their unquantised keys `[B, H, n, D]` into the statistics."""
        stats = self.stats.flatten(2, 3)
        if self.equal_rows and len(set(counts)) == 1:
            update_statistics(stats, key[:, :, : counts[0]].detach(), self.lengths[0], self.logical_page_size)
        else:
            for row, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
                one = slice(row, row + 1)
                update_statistics(stats[one], key[one, :, :count].detach(), start, self.logical_page_size)
        self.lengths = [start + count for start, count in zip(self.lengths, counts, strict=True)]

    @outliving
    def _grow(self, tokens: int, key: Tensor, value: Tensor, scales: tuple[Tensor, Tensor] | None) -> None:
        needed = -(-tokens // self.page_size)
        if needed <= self.capacity:
            return
        capacity = needed + (max(needed // GROWTH, MIN_GROWTH) if self.capacity else 0)
        batch, heads = key.shape[:2]
        sizes = [(batch, heads, capacity, self.page_size, x.shape[3]) for x in (key, value)]
        new_scales = (None, None) if scales is None else scales
        pages = [self.format.allocate(*arguments) for arguments in zip(sizes, (key, value), new_scales, strict=True)]
        stats_shape = (batch, heads, capacity, self.page_size // self.logical_page_size, 2, key.shape[3])
        stats = empty_statistics(stats_shape, self.stats_dtype or key.dtype, key.device)
        if self.capacity:
            held = self.capacity
            for before, after in zip(self._pages, pages, strict=True):
                after.data[:, :, :held] = before.data
                if after.zero is not None:
                    after.scale[:, :, :held] = before.scale
                    after.zero[:, :, :held] = before.zero
            stats[:, :, :held] = self.stats
        self.key, self.value, self._stats = *pages, stats

    # -- reading -------------------------------------------------------------------------------------------------------

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of every row, `[B, H, count, D]` and `[B, H, count, Dv]`: views of floating pages,
        else dequantised (fp32). Rows with fewer tokens hold anything finite behind them."""
        pages = -(-count // self.page_size)
        found = []
        for stored in self._pages:
            part = stored.map(lambda t: t[:, :, :pages])
            found.append(part.dense().flatten(2, 3)[:, :, :count])
        return found[0], found[1]

    def token(self, number: int) -> tuple[Tensor, Tensor]:
        """Token `number` of every row as it is stored, `[B, H, 1, D]` and `[B, H, 1, Dv]`, dequantised."""
        page, inside = divmod(number, self.page_size)
        key, value = (
            stored.map(lambda t: t[:, :, page : page + 1, inside : inside + 1]).dense()[:, :, 0]
            for stored in self._pages
        )
        return key, value

    # -- changing ------------------------------------------------------------------------------------------------------

    def crop(self, counts: list[int]) -> None:
        """Forget the last `counts[b]` tokens of every row; statistics of an opened page are built again.

        With quantised keys that page's statistics come from the dequantised ones.
        """
        if not any(counts):
            return
        size = self.logical_page_size
        keys, stats = self._pages[0], self.stats.flatten(2, 3)
        for row, count in enumerate(counts):
            if count == 0:
                continue
            length = self.lengths[row] - count
            self.lengths[row] = length
            start = length // size
            fresh = stats[row : row + 1, :, start:]
            fresh.copy_(empty_statistics(tuple(fresh.shape), stats.dtype, stats.device))
            if length % size:
                page = length // self.page_size
                tail = keys.map(lambda t, r=row, p=page: t[r : r + 1, :, p : p + 1]).dense()[:, :, 0]
                first = start * size - page * self.page_size
                kept = tail[:, :, first : length - page * self.page_size]
                update_statistics(stats[row : row + 1], kept, start * size, size)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        if self.key is None:
            return
        index = rows.to(self.key.data.device)
        self._stats = self.stats.index_select(0, index)
        self.key, self.value = (pages.map(lambda t: t.index_select(0, index)) for pages in self._pages)
        self.lengths = [self.lengths[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Forget everything and free it."""
        self.key = self.value = self._stats = self._flat = None
        self.lengths, self._unpooled = [], 0

    def to(self, device: torch.device | str) -> None:
        """Move everything."""
        if self.key is not None:
            self._stats = self.stats.to(device, non_blocking=True)
            self.key, self.value = (
                Pages(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in pages))
                for pages in self._pages
            )

    def bytes(self) -> dict[str, int]:
        """Bytes of the pages in use (`data`, `scales`, `zeros`, `statistics`), and of what is `allocated` in all."""
        if self.key is None:
            return {"data": 0, "scales": 0, "zeros": 0, "statistics": 0, "allocated": 0}
        rows, capacity = len(self.lengths), self.capacity
        in_use = sum(-(-length // self.page_size) for length in self.lengths) / max(rows * capacity, 1)
        total = {"statistics": self.stats.numel() * self.stats.element_size()}
        for pages in self._pages:
            for name, size in pages.bytes().items():
                total[name] = total.get(name, 0) + size
        return {name: round(size * in_use) for name, size in total.items()} | {"allocated": sum(total.values())}
