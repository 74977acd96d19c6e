"""Tiles of queries and the stretch of keys ("halo") that each tile reads, along every axis of a grid."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .geometry import Window, group_bounds, group_lengths

# Nanoseconds of one score, of copying one key and value and of one tile, as measured on a CPU core with AVX-512; their
# ratios decide the tile.
SCORE_COST, KEY_COST, TILE_COST = 1.6, 20.0, 500.0
# Tile sizes that are tried along an axis; on a GPU small ones only waste launches.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_CACHED = 64


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis; each lies in one dilation group.

    Args:
        window: of the axis.
        size: queries per tile; halo: keys per tile.
        query: positions on the axis of each tile's queries, int64 `[tiles, size]`; past a group's end the last repeats.
        keys: positions of its halo, int64 `[tiles, halo]`.
        real: which of them count, bool `[tiles, size]`.
        kind: of each tile; tiles of one kind have the same mask.
        low, high, spot: first key, end of keys and own place of every query in its tile's halo, int64 `[kinds, size]`.
    """

    window: Window
    size: int
    halo: int
    query: Tensor
    keys: Tensor
    real: Tensor
    kind: tuple[int, ...]
    low: Tensor
    high: Tensor
    spot: Tensor

    @property
    def count(self) -> int:
        return len(self.query)

    def mask(self, kind: int) -> Tensor:
        """Bool `[size, halo]`: keys that the queries of a tile see."""
        place = torch.arange(self.halo)
        return (self.low[kind][:, None] <= place) & (place < self.high[kind][:, None])


@lru_cache(_CACHED)
def axis_tiles(window: Window, size: int) -> AxisTiles:
    """Cut every dilation group into tiles of `size` queries, the last one padded."""
    pieces = []
    first = 0
    for length in group_lengths(window):
        low, high = group_bounds(window, length)
        for begin in range(0, length, size):
            row = torch.arange(begin, begin + size).clamp(max=length - 1)
            pieces.append((first, length, row, low[row], high[row], torch.arange(begin, begin + size) < length))
        first += length
    halo = max(int(high.max() - low.min()) for _, _, _, low, high, _ in pieces)
    # Tokens group by group: in this order a halo is a stretch.
    order = torch.cat([torch.arange(g, window.length, window.dilation) for g in range(window.dilation)])
    start, kinds, kind, query = [], {}, [], []
    for first, length, row, low, high, _ in pieces:
        # A shorter group may be narrower than the halo: it then reaches into the next one, masked.
        begin = max(min(int(low.min()), length - halo), 0)
        begin = min(begin, window.length - halo - first)
        start.append(first + begin)
        tables = torch.stack([low - begin, high - begin, row - begin])
        kind.append(kinds.setdefault(tuple(tables.flatten().tolist()), len(kinds)))
        query.append(order[first + row])
    tables = torch.tensor(list(kinds)).view(len(kinds), 3, size)
    real = torch.stack([piece[-1] for piece in pieces])
    keys = order[torch.tensor(start)[:, None] + torch.arange(halo)]
    low, high, spot = tables.unbind(1)
    return AxisTiles(window, size, halo, torch.stack(query), keys, real, tuple(kind), low, high, spot)


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles of a grid: the product of the axes' tiles.

    Args:
        axes: tiles of each axis.
        picks: tile of each axis that each tile is made of, int64 `[tiles, axes]`; tiles of one kind are neighbours.
        runs: first tile, end and kinds (of each axis) of every stretch of tiles with one mask.
        padded: some tiles hold padding.
    """

    axes: tuple[AxisTiles, ...]
    picks: Tensor
    runs: tuple[tuple[int, int, tuple[int, ...]], ...]
    padded: bool

    @property
    def count(self) -> int:
        return len(self.picks)

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def halo(self) -> int:
        return math.prod(axis.halo for axis in self.axes)

    def query_tokens(self, tiles: slice) -> Tensor:
        """Flat grid positions of the queries, int64 `[tiles, size]`, last axis fastest; padding repeats a query."""
        return self._flat(tiles, [axis.query for axis in self.axes])

    def key_tokens(self, tiles: slice) -> Tensor:
        """Flat grid positions of the halo, int64 `[tiles, halo]`."""
        return self._flat(tiles, [axis.keys for axis in self.axes])

    def real(self, tiles: slice) -> Tensor:
        """Queries that are no padding, bool `[tiles, size]`."""
        real = torch.ones(1, 1, dtype=torch.bool)
        for dim, axis in enumerate(self.axes):
            real = (real[:, :, None] & axis.real[self.picks[tiles, dim]][:, None]).flatten(1)
        return real

    def _flat(self, tiles: slice, tables: list[Tensor]) -> Tensor:
        flat = torch.zeros(1, 1, dtype=torch.int64)
        for dim, (axis, table) in enumerate(zip(self.axes, tables, strict=True)):
            flat = (flat[:, :, None] * axis.window.length + table[self.picks[tiles, dim]][:, None]).flatten(1)
        return flat

    def mask(self, kinds: tuple[int, ...]) -> Tensor:
        """Bool `[size, halo]` for tiles of these kinds along the axes."""
        mask = torch.ones(1, 1, dtype=torch.bool)
        for axis, kind in zip(self.axes, kinds, strict=True):
            mask = (mask[:, None, :, None] & axis.mask(kind)[None, :, None, :]).flatten(2).flatten(0, 1)
        return mask

    def bias_places(self, kinds: tuple[int, ...]) -> Tensor:
        """Entries of the flattened table of relative positions, int64 `[size, halo]`; any entry for masked pairs."""
        places = torch.zeros(1, 1, dtype=torch.int64)
        for axis, kind in zip(self.axes, kinds, strict=True):
            width = 2 * axis.window.kernel - 1
            part = torch.arange(axis.halo) - axis.spot[kind][:, None] + axis.window.kernel - 1
            part = part.clamp(0, width - 1)
            places = (places[:, None, :, None] * width + part[None, :, None, :]).flatten(2).flatten(0, 1)
        return places

    def slots(self, kinds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Key of the halo in each window slot, int64 `[size, prod K]`, and whether there is one; 0 where not."""
        places, real = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        for axis, kind in zip(self.axes, kinds, strict=True):
            slot = axis.low[kind][:, None] + torch.arange(axis.window.kernel)
            here = slot < axis.high[kind][:, None]
            places = (places[:, None, :, None] * axis.halo + slot[None, :, None, :]).flatten(2).flatten(0, 1)
            real = (real[:, None, :, None] & here[None, :, None, :]).flatten(2).flatten(0, 1)
        return places.where(real, 0), real


@lru_cache(_CACHED)
def tiling(windows: tuple[Window, ...], sizes: tuple[int, ...]) -> Tiling:
    """Tiles of `sizes` queries over a grid."""
    # What is kept must not be an inference tensor: later calls may need gradients.
    with torch.inference_mode(False):
        axes = tuple(axis_tiles(window, size) for window, size in zip(windows, sizes, strict=True))
        picks = torch.cartesian_prod(*(torch.arange(axis.count) for axis in axes)).view(-1, len(axes))
        number = torch.zeros(len(picks), dtype=torch.int64)
        for dim, axis in enumerate(axes):
            number = number * len(axis.low) + torch.tensor(axis.kind)[picks[:, dim]]
        order = number.argsort(stable=True)
        picks, number = picks[order], number[order]
        kinds, lengths = number.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        runs = []
        for kind, begin, end in zip(kinds.tolist(), (ends - lengths).tolist(), ends.tolist(), strict=True):
            of_axes = []
            for axis in reversed(axes):
                kind, of_axis = divmod(kind, len(axis.low))
                of_axes.append(of_axis)
            runs.append((begin, end, tuple(reversed(of_axes))))
        return Tiling(axes, picks, tuple(runs), not all(bool(axis.real.all()) for axis in axes))


@lru_cache(_CACHED)
def choose_sizes(windows: tuple[Window, ...]) -> tuple[int, ...]:
    """Queries per tile along each axis that cost least by the model above."""
    options = [candidates(window) for window in windows]

    def cost(shapes: tuple[tuple[int, int, int], ...]) -> float:
        sizes, halos, counts = zip(*shapes, strict=True)
        size, halo, count = math.prod(sizes), math.prod(halos), math.prod(counts)
        tile = size * halo * SCORE_COST + halo * KEY_COST + TILE_COST
        return count * tile

    return tuple(shape[0] for shape in min(itertools.product(*options), key=cost))


def candidates(window: Window) -> list[tuple[int, int, int]]:
    """Queries per tile, keys per tile and tiles along an axis, for all sizes that are worth a try."""
    return [_shape(window, size) for size in _sizes(window)]


def _sizes(window: Window) -> list[int]:
    longest = -(-window.length // window.dilation)
    # Sizes around the kernel cost least; whole groups serve short axes.
    sizes = {size for size in SIZES if size < longest and size <= 2 * window.kernel}
    sizes |= {window.stride} if window.stride < longest else set()
    return sorted(sizes | {longest})


@lru_cache(1024)
def _shape(window: Window, size: int) -> tuple[int, int, int]:
    """Queries per tile, keys per tile and tiles of an axis."""
    lengths = group_lengths(window)
    halo = 0
    for length in set(lengths):
        # Neither starts nor ends of windows ever fall along an axis.
        low, high = group_bounds(window, length)
        begin = torch.arange(0, length, size)
        end = (begin + size).clamp(max=length) - 1
        halo = max(halo, int((high[end] - low[begin]).max()))
    return size, halo, sum(-(-length // size) for length in lengths)
