"""Tensors of a grid in tiles and halos, and back: what the torch paths share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .geometry import Window
from .tiles import Tiling, choose_sizes, tiling

# Scores that are formed at a time: what stays in a core's cache, and what fills a GPU.
CPU_SCORES, GPU_SCORES = 1 << 18, 1 << 25
# Masks of at most this many entries are kept from call to call.
KEPT_MASK = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """Tiles computed together: tile `outer` of the leading axes, ranges of batch, heads and last-axis tiles."""

    outer: int
    kinds: tuple[int, ...]
    halo: tuple[slice, ...]
    batch: slice
    heads: slice
    tiles: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch rows, heads and last-axis tiles."""
        return tuple(s.stop - s.start for s in (self.batch, self.heads, self.tiles))

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        return self.batch, self.heads, self.tiles


@dataclass(eq=False)
class TiledGrid:
    """One call's tiling with its sizes; moves tensors between the grid, tiles of queries and strips of keys.

    Args:
        windows: of each axis; batch; heads: KV heads; group: query heads of each; extra: keys off the grid, which every
            query sees; device; dtype: of the computation.
    """

    windows: tuple[Window, ...]
    batch: int
    heads: int
    group: int
    extra: int
    device: torch.device
    dtype: torch.dtype
    tiles: Tiling = field(init=False)

    def __post_init__(self) -> None:
        self.tiles = tiling(self.windows, choose_sizes(self.windows, max(self.batch * self.heads, 1)))

    @property
    def queries(self) -> int:
        """Rows of a tile: its queries for each query head of the KV head."""
        return self.group * self.tiles.size

    @property
    def keys(self) -> int:
        """Columns of a tile: its halo and the extra keys."""
        return self.tiles.halo + self.extra

    def chunks(self) -> Iterator[Chunk]:
        """All tiles, so many at a time that the scores stay within bounds."""
        most = CPU_SCORES if self.device.type == "cpu" else GPU_SCORES
        fit = max(most // max(self.queries * self.keys, 1), 1)
        last = self.tiles.last.count
        tiles, heads = min(fit, last), min(max(fit // last, 1), self.heads)
        batch = min(max(fit // (last * self.heads), 1), max(self.batch, 1))
        for outer, (kinds, halo) in enumerate(self.tiles.outer_tiles()):
            for b in _ranges(self.batch, batch):
                for h in _ranges(self.heads, heads):
                    for t in _ranges(last, tiles):
                        yield Chunk(outer, kinds, halo, b, h, t)

    def runs(self, chunk: Chunk) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """Tiles of the chunk that share one mask, and their kinds."""
        first, stop = chunk.tiles.start, chunk.tiles.stop
        for begin, end, kind in self.tiles.runs():
            begin, end = max(begin, first), min(end, stop)
            if begin < end:
                yield slice(begin - first, end - first), (*chunk.kinds, kind)

    # -- queries ---------------------------------------------------------------------------------------------------

    def to_tiles(self, x: Tensor) -> Tensor:
        """`[B, N, Hq, ...]` -> `[outer, B, Hkv, tiles, group * size, ...]` in the dtype of the computation."""
        rows = self._query_rows()
        moved = x.reshape(rows.numel() and self.batch * x.shape[1] * x.shape[2], -1).index_select(0, rows.flatten())
        return moved.to(self.dtype).view(*rows.shape[:4], self.queries, *x.shape[3:])

    def from_tiles(self, x: Tensor) -> Tensor:
        """The inverse of `to_tiles`."""
        last, size = self.tiles.last.count, self.tiles.size
        place = self.tiles.place.to(self.device)[:, None, None]
        outer, tile, spot = place // (last * size), place // size % last, place % size
        head = torch.arange(self.heads, device=self.device)[:, None]
        member = torch.arange(self.group, device=self.device)
        batch = torch.arange(self.batch, device=self.device)[:, None, None, None]
        rows = ((outer * self.batch + batch) * self.heads + head) * last + tile
        rows = rows * self.queries + member * size + spot
        moved = x.reshape(-1, x[0, 0, 0, 0, 0].numel()).index_select(0, rows.flatten())
        return moved.view(self.batch, -1, self.heads * self.group, *x.shape[5:])

    def real_queries(self) -> Tensor | None:
        """1 where a query counts, 0 in padding, `[outer, 1, 1, tiles, group * size, 1]`; None: all count."""
        real = self.tiles.real
        if real is None:
            return None
        real = real.view(self.tiles.outer, 1, 1, -1, 1, self.tiles.size).expand(-1, -1, -1, -1, self.group, -1)
        return real.flatten(4)[..., None].to(self.device, self.dtype)

    def _query_rows(self) -> Tensor:
        tokens = self.tiles.queries.to(self.device).view(self.tiles.outer, 1, 1, -1, 1, self.tiles.size)
        head = torch.arange(self.heads, device=self.device).view(-1, 1, 1, 1)
        member = torch.arange(self.group, device=self.device).view(-1, 1)
        batch = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1, 1) * self.tiles.place.numel()
        return (tokens + batch) * (self.heads * self.group) + head * self.group + member

    # -- keys ------------------------------------------------------------------------------------------------------

    def strips(self, x: Tensor) -> Tensor:
        """`[B, N + M, Hkv, C]` -> `[B, Hkv, tiles, other axes ..., halo of the last axis, C]`: the last axis cut into
        overlapping halos, the others in group-major order."""
        position = self.tiles.strip_positions().to(self.device)
        head = torch.arange(x.shape[2], device=self.device).view(-1, 1, 1, 1)
        batch = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1, 1) * x.shape[1]
        rows = (position + batch) * x.shape[2] + head
        moved = x.reshape(-1, x.shape[3]).index_select(0, rows.flatten()).to(self.dtype)
        return moved.view(*rows.shape[:3], *self._outer_lengths(), self.tiles.last.halo, x.shape[3])

    def beside(self, x: Tensor) -> Tensor | None:
        """The extra keys `[B, Hkv, M, C]`, or None."""
        if not self.extra:
            return None
        return x[:, x.shape[1] - self.extra :].transpose(1, 2).to(self.dtype)

    def halo(self, strips: Tensor, beside: Tensor | None, chunk: Chunk) -> Tensor:
        """Keys of the chunk's tiles, `[rows, halo + M, C]`; a view where the grid has at most two axes."""
        batch, heads, tiles = chunk.shape
        keys = self.halo_view(strips, chunk).reshape(batch * heads * tiles, self.tiles.halo, strips.shape[-1])
        if beside is None:
            return keys
        extra = beside[chunk.batch, chunk.heads, None].expand(-1, -1, tiles, -1, -1)
        return torch.cat([keys, extra.reshape(len(keys), self.extra, -1)], 1)

    def halo_view(self, strips: Tensor, chunk: Chunk) -> Tensor:
        """The same without extra keys, `[batch, heads, tiles, halo of each axis ..., C]`, always a view."""
        return strips[(*chunk.rows, *chunk.halo)]

    def add_to_strips(self, strips: Tensor, beside: Tensor | None, chunk: Chunk, grad: Tensor) -> None:
        """Add `[rows, halo + M, C]` where `halo` read it."""
        view = self.halo_view(strips, chunk)
        view += grad[:, : self.tiles.halo].reshape(view.shape)
        if beside is not None:
            parts = grad[:, self.tiles.halo :].unflatten(0, chunk.shape)
            beside[chunk.batch, chunk.heads] += parts.sum(2)

    def fold(self, strips: Tensor, beside: Tensor | None) -> Tensor:
        """Sum of what overlapping strips hold for each key, `[B, N + M, Hkv, C]`: the adjoint of `strips`."""
        last = self.tiles.last
        size = strips.shape[-1]
        lengths = self._outer_lengths()
        total = strips.new_zeros(self.batch, strips.shape[1], *lengths, last.window.length, size)
        for tile, start in enumerate(last.start):
            total[..., start : start + last.halo, :] += strips[:, :, tile]
        for dim, axis in enumerate(self.tiles.axes, start=2):
            if axis.window.dilation > 1:
                total = total.index_select(dim, axis.order().argsort().to(self.device))
        total = total.flatten(2, -2)
        return (total if beside is None else torch.cat([total, beside], 2)).transpose(1, 2)

    def _outer_lengths(self) -> tuple[int, ...]:
        return tuple(axis.window.length for axis in self.tiles.axes[:-1])

    # -- masks -----------------------------------------------------------------------------------------------------

    def hidden(self, kinds: tuple[int, ...]) -> Tensor:
        """Keys that the queries of a tile do not see, bool `[size, halo + M]`."""
        mask = ~self.tiles.mask(kinds).to(self.device)
        return torch.nn.functional.pad(mask, (0, self.extra)) if self.extra else mask

    def mask_bias(self, kinds: tuple[int, ...]) -> Tensor | None:
        """-inf where hidden, else 0, `[size, halo + M]`; None where nothing is hidden."""
        if self.tiles.size * self.keys > KEPT_MASK:
            return _mask_bias(self.tiles, kinds, self.extra, self.device, self.dtype)
        return _kept_mask_bias(self.tiles, kinds, self.extra, self.device, self.dtype)


def finite(*tensors: Tensor) -> bool:
    """Whether no value is inf or NaN; a sum beyond the dtype's range counts as inf."""
    return all(bool(x.sum().isfinite()) for x in tensors)


def mix(weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """weights @ values. With `hidden` (bool, as weights), values that are not finite give NaN where a row does not hide
    them and nothing elsewhere."""
    if hidden is None:
        return weights @ values
    sees = (~hidden).to(weights.dtype) @ (~values.isfinite()).to(weights.dtype)
    return (weights @ values.nan_to_num(0, 0, 0)).masked_fill_(sees > 0, float("nan"))


def transposed(hidden: Tensor | None) -> Tensor | None:
    """Seen from the keys."""
    return None if hidden is None else hidden.mT


def _ranges(length: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _mask_bias(
    tiles: Tiling, kinds: tuple[int, ...], extra: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    with torch.inference_mode(False):
        mask = tiles.mask(kinds)
        if bool(mask.all()):
            return None
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return torch.nn.functional.pad(bias, (0, extra)).to(device)


_kept_mask_bias = lru_cache(128)(_mask_bias)
