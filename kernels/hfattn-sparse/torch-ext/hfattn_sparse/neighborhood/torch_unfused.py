"""Scores and mixing of neighborhood attention apart, in plain torch: the products of `torch_path`, slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Window
from .torch_tiles import Chunk, TiledGrid, finite, mix, transposed


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, *, windows: tuple[Window, ...]) -> Tensor:
    """Arguments and result of `reference.scores`."""
    grid = _Slots(query, windows)
    if not query.numel():
        return query.new_zeros(*query.shape[:3], grid.slots)
    queries, keys = grid.to_tiles(query.transpose(1, 2)), grid.strips(key.transpose(1, 2))
    table = None if rpb is None else rpb.to(grid.dtype).flatten(1)
    out = torch.empty(*queries.shape[:5], grid.slots, dtype=grid.dtype, device=query.device)
    for chunk in grid.chunks():
        dense = queries[chunk.outer][chunk.rows].flatten(0, 2) @ grid.halo(keys, None, chunk).mT
        picked = grid.gather(dense, chunk)
        for run, kinds in grid.runs(chunk):
            if table is not None:
                picked[:, :, run] += table[chunk.heads, grid.slot_bias_places(kinds)][:, None]
            picked[:, :, run].masked_fill_(~grid.slot_table(kinds)[1], float("-inf"))
        out[chunk.outer][chunk.rows] = picked
    return grid.from_tiles(out).transpose(1, 2).to(query.dtype)


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, *, windows: tuple[Window, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and rpb for `scores`."""
    if not query.numel():
        return torch.zeros_like(query), torch.zeros_like(key), None if rpb is None else torch.zeros_like(rpb)
    grid = _Slots(query, windows)
    careful = not finite(grad, query, key)
    queries, keys = grid.to_tiles(query.transpose(1, 2)), grid.strips(key.transpose(1, 2))
    upstream = grid.to_real_tiles(grad.transpose(1, 2))
    grad_query, grad_keys = torch.empty_like(queries), torch.zeros_like(keys)
    grad_table = None if rpb is None else torch.zeros_like(rpb, dtype=grid.dtype).flatten(1)
    for chunk in grid.chunks():
        incoming = upstream[chunk.outer][chunk.rows]
        dense = grid.scatter(incoming, chunk)
        hidden = grid.chunk_hidden(dense, chunk) if careful else None
        grad_query[chunk.outer][chunk.rows] = mix(dense, grid.halo(keys, None, chunk), hidden).unflatten(0, chunk.shape)
        part = queries[chunk.outer][chunk.rows].flatten(0, 2)
        grid.add_to_strips(grad_keys, None, chunk, mix(dense.mT, part, transposed(hidden)))
        if grad_table is None:
            continue
        for run, kinds in grid.runs(chunk):
            per_slot = incoming[:, :, run].masked_fill(~grid.slot_table(kinds)[1], 0).sum((0, 2)).flatten(1)
            grad_table[chunk.heads].index_add_(1, grid.slot_bias_places(kinds).flatten(), per_slot)
    return (
        grid.from_tiles(grad_query).transpose(1, 2).to(query.dtype),
        grid.fold(grad_keys, None).transpose(1, 2).to(key.dtype),
        None if rpb is None else grad_table.view(rpb.shape).to(rpb.dtype),
    )


def weighted_values(weights: Tensor, value: Tensor, *, windows: tuple[Window, ...]) -> Tensor:
    """Arguments and result of `reference.weighted_values`."""
    if not value.numel():
        return torch.zeros_like(value)
    grid = _Slots(value, windows)
    careful = not finite(weights, value)
    tiles, values = grid.to_tiles(weights.transpose(1, 2)), grid.strips(value.transpose(1, 2))
    out = torch.empty(*tiles.shape[:5], value.shape[3], dtype=grid.dtype, device=value.device)
    for chunk in grid.chunks():
        dense = grid.scatter(tiles[chunk.outer][chunk.rows], chunk)
        hidden = grid.chunk_hidden(dense, chunk) if careful else None
        out[chunk.outer][chunk.rows] = mix(dense, grid.halo(values, None, chunk), hidden).unflatten(0, chunk.shape)
    return grid.from_tiles(out).transpose(1, 2).to(value.dtype)


def weighted_values_backward(
    grad: Tensor, weights: Tensor, value: Tensor, *, windows: tuple[Window, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and value for `weighted_values`."""
    if not value.numel():
        return torch.zeros_like(weights), torch.zeros_like(value)
    grid = _Slots(value, windows)
    careful = not finite(grad, weights, value)
    tiles, values = grid.to_tiles(weights.transpose(1, 2)), grid.strips(value.transpose(1, 2))
    upstream = grid.to_real_tiles(grad.transpose(1, 2))
    grad_weights, grad_values = torch.empty_like(tiles), torch.zeros_like(values)
    for chunk in grid.chunks():
        incoming = upstream[chunk.outer][chunk.rows].flatten(0, 2)
        dense = grid.scatter(tiles[chunk.outer][chunk.rows], chunk)
        hidden = grid.chunk_hidden(dense, chunk) if careful else None
        grid.add_to_strips(grad_values, None, chunk, mix(dense.mT, incoming, transposed(hidden)))
        picked = grid.gather(incoming @ grid.halo(values, None, chunk).mT, chunk)
        for run, kinds in grid.runs(chunk):
            picked[:, :, run].masked_fill_(~grid.slot_table(kinds)[1], 0)
        grad_weights[chunk.outer][chunk.rows] = picked
    return (
        grid.from_tiles(grad_weights).transpose(1, 2).to(weights.dtype),
        grid.fold(grad_values, None).transpose(1, 2).to(value.dtype),
    )


class _Slots(TiledGrid):
    """Tiles whose columns are window slots: heads-first tensors, one KV head a query head."""

    def __init__(self, tensor: Tensor, windows: tuple[Window, ...]) -> None:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        super().__init__(windows, tensor.shape[0], tensor.shape[1], 1, 0, tensor.device, dtype)
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def slots(self) -> int:
        size = 1
        for window in self.windows:
            size *= window.kernel
        return size

    def to_real_tiles(self, x: Tensor) -> Tensor:
        """`to_tiles` with 0 in the padding of tiles."""
        tiles, real = self.to_tiles(x), self.real_queries()
        return tiles if real is None else tiles.mul_(real)

    def slot_table(self, kinds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """`Tiling.slots` on the device."""
        if kinds not in self._tables:
            self._tables[kinds] = tuple(x.to(self.device) for x in self.tiles.slots(kinds))
        return self._tables[kinds]

    def slot_bias_places(self, kinds: tuple[int, ...]) -> Tensor:
        """Entries of the flattened table of relative positions, int64 `[size, slots]`."""
        return self.tiles.bias_places(kinds).to(self.device).gather(1, self.slot_table(kinds)[0])

    def gather(self, dense: Tensor, chunk: Chunk) -> Tensor:
        """`[rows, size, halo]` -> `[batch, heads, tiles, size, slots]`."""
        parts = dense.unflatten(0, chunk.shape)
        out = dense.new_empty(*chunk.shape, self.tiles.size, self.slots)
        for run, kinds in self.runs(chunk):
            index = self.slot_table(kinds)[0].expand_as(out[:, :, run])
            out[:, :, run] = parts[:, :, run].gather(-1, index)
        return out

    def scatter(self, slots: Tensor, chunk: Chunk) -> Tensor:
        """The adjoint of `gather`; slots without a key are dropped."""
        dense = slots.new_zeros(*chunk.shape, self.tiles.size, self.tiles.halo)
        for run, kinds in self.runs(chunk):
            places, real = self.slot_table(kinds)
            part = slots[:, :, run].masked_fill(~real, 0)
            dense[:, :, run] = dense[:, :, run].scatter_add(-1, places.expand_as(part), part)
        return dense.flatten(0, 2)

    def chunk_hidden(self, dense: Tensor, chunk: Chunk) -> Tensor:
        """Pairs that no window joins, bool like `dense`."""
        hidden = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
        parts = hidden.unflatten(0, chunk.shape)
        for run, kinds in self.runs(chunk):
            parts[:, :, run] = self.hidden(kinds)
        return hidden
