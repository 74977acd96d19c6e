"""Aggregation of values by predicted window weights: the dynamic convolution of OverLoCK (NATTEN's `na2d_av`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Backend = Literal["auto", "tiled", "dense"]
# Up to here one matrix over the whole map is faster than tiles, on a CPU.
DENSE_TOKENS = 128


def window_starts(length: int, kernel: int, device: torch.device | None = None) -> Tensor:
    """First key of every query's window along an axis: centred, shifted inwards at the borders; int `[length]`."""
    return (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)


def window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Relative position bias of every window: table `[g, 2K - 1, 2K - 1]` -> `[g, H, W, K, K]`.

    Entry (key - query + K - 1) of the table, row and column, as in neighborhood attention without dilation.
    """
    kernel = (table.shape[1] + 1) // 2
    # A window's entries are K neighbours in the table, so a query needs its first row and column only.
    rows, columns = (
        window_starts(length, kernel, table.device) - torch.arange(length, device=table.device) + kernel - 1
        for length in (height, width)
    )
    windows = table.unfold(1, kernel, 1).unfold(2, kernel, 1)
    return windows.index_select(1, rows).index_select(2, columns)


def mix_windows(weights: Tensor, values: Tensor, kernel: int, backend: Backend = "auto") -> Tensor:
    """Weighted sum of every query's window, `out[n] = sum_m weights[n, m] * values[window(n)[m]]`.

    Queries are taken in tiles. The windows of a tile lie in one box of keys, so a tile is one matrix product of its
    weights, set into rows of the box, with the box's values; where all windows of a tile agree nothing is set.

    Args:
        weights: `[B, g, H, W, K * K]`, row-major over the window.
        values: `[B, g, H, W, c]`.
        kernel: K <= min(H, W), odd.
        backend: "tiled", "dense" (one tile), or "auto": dense for the smallest maps.

    Returns `[B, g, H, W, c]`.
    """
    batch, heads, height, width, _ = weights.shape
    if kernel == height == width:  # one window, whatever the backend
        return (weights.flatten(2, 3) @ values.flatten(2, 3)).unflatten(2, (height, width))
    dense = backend == "dense" or (backend == "auto" and height * width <= DENSE_TOKENS)
    tall, wide = (_Axis(length, kernel, length) if dense else _tile(length, kernel) for length in (height, width))
    rows, columns = -(-height // tall.queries), -(-width // wide.queries)
    extra = (rows * tall.queries - height, columns * wide.queries - width)
    if any(extra):
        weights = pad(weights, (0, 0, 0, extra[1], 0, extra[0]))
    boxes = values.index_select(2, tall.keys(values.device)).unflatten(2, (rows, tall.box))
    boxes = boxes.index_select(4, wide.keys(values.device)).unflatten(4, (columns, wide.box))
    boxes = boxes.transpose(3, 4).reshape(batch, heads, rows, columns, tall.box * wide.box, -1)
    tiles = weights.unflatten(3, (columns, wide.queries)).unflatten(2, (rows, tall.queries)).transpose(3, 4)
    tiles = tiles.reshape(batch, heads, rows, columns, tall.queries * wide.queries, kernel * kernel)
    if tall.box > kernel or wide.box > kernel:
        index = _places(tall, wide, values.device).expand(batch, heads, *(-1,) * 4)
        empty = tiles.new_zeros(*tiles.shape[:-1], tall.box * wide.box)
        tiles = empty.scatter(-1, index, tiles)
    out = (tiles @ boxes).unflatten(4, (tall.queries, wide.queries)).transpose(3, 4)
    out = out.reshape(batch, heads, rows * tall.queries, columns * wide.queries, -1)
    return out[:, :, :height, :width] if any(extra) else out


class _Axis:
    """Tiles along one axis: `queries` of them each, their windows within `box` keys."""

    def __init__(self, length: int, kernel: int, queries: int) -> None:
        self.length, self.kernel, self.queries = length, kernel, queries
        firsts = range(0, length, queries)
        ends = [self._start(min(first + queries, length) - 1) + kernel for first in firsts]
        self.box = max(end - self._start(first) for first, end in zip(firsts, ends, strict=True))
        # The box of the last tiles is moved inwards, so that all boxes have one size.
        self.begins = [min(self._start(first), length - self.box) for first in firsts]

    def _start(self, query: int) -> int:
        return min(max(query - self.kernel // 2, 0), self.length - self.kernel)

    @property
    def cost(self) -> float:
        """Products a query takes part in along this axis, padded queries included."""
        return self.box * len(self.begins) * self.queries / self.length

    def keys(self, device: torch.device) -> Tensor:
        """Rows of all boxes, `[tiles * box]`."""
        return (torch.tensor(self.begins, device=device)[:, None] + torch.arange(self.box, device=device)).flatten()

    def offsets(self, device: torch.device) -> Tensor:
        """Where in its box a query's window begins, `[tiles, queries]`; 0 for queries beyond the end."""
        starts = [
            [self._start(q) - begin if q < self.length else 0 for q in range(first, first + self.queries)]
            for first, begin in zip(range(0, self.length, self.queries), self.begins, strict=True)
        ]
        return torch.tensor(starts, device=device)


def _tile(length: int, kernel: int) -> _Axis:
    """The tile with the fewest products; of equals the largest."""
    best = _Axis(length, kernel, min(length, 16))
    for queries in range(best.queries - 1, min(4, length) - 1, -1):  # a loop: graphs break on min with a key
        axis = _Axis(length, kernel, queries)
        best = axis if axis.cost < best.cost else best
    return best


def _places(tall: _Axis, wide: _Axis, device: torch.device) -> Tensor:
    """Position in its box of every weight, `[1, 1, rows, columns, queries, K * K]`."""
    window = torch.arange(tall.kernel, device=device)
    down = (tall.offsets(device)[..., None] + window) * wide.box
    right = wide.offsets(device)[..., None] + window
    places = down[:, None, :, None, :, None] + right[None, :, None, :, None, :]
    return places.flatten(4, 5).flatten(2, 3)[None, None]
