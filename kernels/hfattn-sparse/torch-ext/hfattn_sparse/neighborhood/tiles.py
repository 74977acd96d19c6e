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
SCORE_COST, KEY_COST, TILE_COST, LOOP_COST = 1.6, 25.0, 500.0, 40_000.0
# Tile sizes that are tried along an axis; on a GPU small ones only waste launches.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_CACHED = 64


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis, in group-major order: the tokens of dilation group 0, then those of group 1, ...

    Args:
        window: of the axis.
        size: queries per tile; halo: keys per tile.
        start: first key of each tile in group-major order.
        query: positions on the axis of each tile's queries, int64 `[tiles, size]`; past a group's end the last repeats.
        real: which of them count, bool `[tiles, size]`.
        kind: of each tile; tiles of one kind have the same mask.
        low, high, spot: first key, end of keys and own place of every query in its tile's halo, int64 `[kinds, size]`.
    """

    window: Window
    size: int
    halo: int
    start: tuple[int, ...]
    query: Tensor
    real: Tensor
    kind: tuple[int, ...]
    low: Tensor
    high: Tensor
    spot: Tensor

    @property
    def count(self) -> int:
        return len(self.start)

    def order(self) -> Tensor:
        """Axis positions in group-major order, int64 `[length]`."""
        step = self.window.dilation
        return torch.cat([torch.arange(g, self.window.length, step) for g in range(min(step, self.window.length))])

    def keys(self) -> Tensor:
        """Axis positions of each tile's halo, int64 `[tiles, halo]`."""
        return self.order()[torch.tensor(self.start)[:, None] + torch.arange(self.halo)]

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
    return AxisTiles(
        window, size, halo, tuple(start), torch.stack(query), real, tuple(kind), tables[:, 0], tables[:, 1],
        tables[:, 2],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles of a grid: the product of the axes' tiles.

    Args:
        axes: tiles of each axis.
        queries: flat grid position of every query of every tile, int64 `[tiles, size]`, last axis fastest.
        place: where each grid token sits among them, int64 `[N]`.
        real: which of them count, bool `[tiles, size]`, or None when all do.
    """

    axes: tuple[AxisTiles, ...]
    queries: Tensor
    place: Tensor
    real: Tensor | None

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def halo(self) -> int:
        return math.prod(axis.halo for axis in self.axes)

    @property
    def outer(self) -> int:
        """Tiles over all axes but the last."""
        return math.prod(axis.count for axis in self.axes[:-1])

    @property
    def last(self) -> AxisTiles:
        return self.axes[-1]

    def strip_positions(self) -> Tensor:
        """Flat grid positions `[tiles of the last axis, other axes, halo of the last axis]`.

        The other axes are in group-major order, so a tile's halo along them is a slice.
        """
        flat = torch.zeros(1, dtype=torch.int64)
        for axis in self.axes[:-1]:
            flat = (flat[:, None] * axis.window.length + axis.order()).flatten()
        return flat[None, :, None] * self.last.window.length + self.last.keys()[:, None]

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

    def outer_tiles(self) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Kinds and halo slices (group-major) over all axes but the last, one entry a tile."""
        axes = [list(zip(axis.kind, axis.start, strict=True)) for axis in self.axes[:-1]]
        halos = [axis.halo for axis in self.axes[:-1]]
        found = []
        for tile in itertools.product(*axes):
            slices = tuple(slice(start, start + halo) for (_, start), halo in zip(tile, halos, strict=True))
            found.append((tuple(kind for kind, _ in tile), slices))
        return found

    def runs(self) -> list[tuple[int, int, int]]:
        """Stretches of tiles of one kind along the last axis: first, end, kind."""
        runs, first = [], 0
        for kind, group in itertools.groupby(self.last.kind):
            end = first + len(list(group))
            runs.append((first, end, kind))
            first = end
        return runs


@lru_cache(_CACHED)
def tiling(windows: tuple[Window, ...], sizes: tuple[int, ...]) -> Tiling:
    """Tiles of `sizes` queries over a grid."""
    # What is kept must not be an inference tensor: later calls may need gradients.
    with torch.inference_mode(False):
        axes = tuple(axis_tiles(window, size) for window, size in zip(windows, sizes, strict=True))
        queries, real = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        for axis in axes:
            queries = queries[:, None, :, None] * axis.window.length + axis.query[None, :, None, :]
            real = real[:, None, :, None] & axis.real[None, :, None, :]
            queries, real = queries.flatten(2).flatten(0, 1), real.flatten(2).flatten(0, 1)
        place = torch.empty(math.prod(w.length for w in windows), dtype=torch.int64)
        place[queries[real]] = torch.arange(queries.numel()).view(queries.shape)[real]
        return Tiling(axes, queries, place, None if bool(real.all()) else real)


@lru_cache(_CACHED)
def choose_sizes(windows: tuple[Window, ...], rows: int) -> tuple[int, ...]:
    """Queries per tile along each axis that cost least by the model above; `rows`: batch times KV heads."""
    options = [[_shape(window, size) for size in _sizes(window)] for window in windows]

    def cost(shapes: tuple[tuple[int, int, int], ...]) -> float:
        sizes, halos, counts = zip(*shapes, strict=True)
        size, halo, count = math.prod(sizes), math.prod(halos), math.prod(counts)
        tile = size * halo * SCORE_COST + halo * KEY_COST + TILE_COST
        return rows * count * tile + math.prod(counts[:-1]) * LOOP_COST

    return tuple(shape[0] for shape in min(itertools.product(*options), key=cost))


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
