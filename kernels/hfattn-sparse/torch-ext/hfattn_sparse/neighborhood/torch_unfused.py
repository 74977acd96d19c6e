"""Scores and mixing of neighborhood attention apart, in plain torch: the products of `torch_path`, slot by slot."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .geometry import Window
from .torch_tiles import Chunk, TiledGrid, finite, mix, mix_transposed


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, *, windows: tuple[Window, ...]) -> Tensor:
    """Arguments and result of `reference.scores`."""
    grid = _Slots(query, windows)
    query, key = _rows(query, key)
    out = query.new_empty(*query.shape[:2], grid.slots)
    table = None if rpb is None else rpb.to(grid.dtype).flatten(1)[:, None]
    for b, chunk in itertools.product(range(len(query)), grid.chunks()):
        queries, keys = grid.take_queries("queries", query[b], chunk), grid.take_keys("keys", key[b], chunk)
        picked = grid.gather(torch.bmm(queries, keys.mT, out=grid.scores("scores", chunk)), chunk)
        for run, kinds in chunk.runs:
            if table is not None:
                picked[run] += table[chunk.heads][..., grid.slot_bias_places(kinds)]
            picked[run].masked_fill_(~grid.slot_table(kinds)[1], float("-inf"))
        grid.put_queries(out[b], chunk, picked)
    return _unrows(out, grid)


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, *, windows: tuple[Window, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and rpb for `scores`."""
    grid = _Slots(query, windows)
    careful = not finite(grad, query, key)
    grad, query, key = _rows(grad, query, key)
    grads = [torch.zeros(query.shape, dtype=grid.dtype, device=query.device) for _ in range(2)]
    grad_table = None if rpb is None else torch.zeros_like(rpb, dtype=grid.dtype).flatten(1)
    for b, chunk in itertools.product(range(len(query)), grid.chunks()):
        queries, keys = grid.take_queries("queries", query[b], chunk), grid.take_keys("keys", key[b], chunk)
        upstream = grid.clear_padding(grid.take_queries("upstream", grad[b], chunk), chunk)
        dense = grid.scatter(upstream, chunk)
        hidden = grid.chunk_hidden(chunk) if careful else None
        size = query.shape[2]
        grid.add_queries(grads[0][b], chunk, mix(dense, keys, hidden, grid.room("dq", grid.queries, size, chunk)))
        grad_keys = mix_transposed(dense, queries, hidden, grid.room("dk", grid.keys, size, chunk))
        grid.add_keys(grads[1][b], chunk, grad_keys)
        if grad_table is None:
            continue
        parts = grid.parts(upstream, chunk)
        for run, kinds in chunk.runs:
            per_slot = parts[run].masked_fill(~grid.slot_table(kinds)[1], 0).sum(0).flatten(1)
            grad_table[chunk.heads].index_add_(1, grid.slot_bias_places(kinds).flatten(), per_slot)
    grad_query, grad_key = (_unrows(x, grid).to(query.dtype) for x in grads)
    return grad_query, grad_key, None if rpb is None else grad_table.view(rpb.shape).to(rpb.dtype)


def weighted_values(weights: Tensor, value: Tensor, *, windows: tuple[Window, ...]) -> Tensor:
    """Arguments and result of `reference.weighted_values`."""
    grid = _Slots(value, windows)
    careful = not finite(weights, value)
    weights, value = _rows(weights, value)
    out = torch.empty_like(value)
    for b, chunk in itertools.product(range(len(value)), grid.chunks()):
        dense = grid.scatter(grid.take_queries("weights", weights[b], chunk), chunk)
        hidden = grid.chunk_hidden(chunk) if careful else None
        mixed = grid.room("mixed", grid.queries, value.shape[2], chunk)
        grid.put_queries(out[b], chunk, mix(dense, grid.take_keys("values", value[b], chunk), hidden, mixed))
    return _unrows(out, grid)


def weighted_values_backward(
    grad: Tensor, weights: Tensor, value: Tensor, *, windows: tuple[Window, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and value for `weighted_values`."""
    grid = _Slots(value, windows)
    careful = not finite(grad, weights, value)
    grad, weights, value = _rows(grad, weights, value)
    grad_weights = torch.empty_like(weights)
    grad_value = torch.zeros(value.shape, dtype=grid.dtype, device=value.device)
    for b, chunk in itertools.product(range(len(value)), grid.chunks()):
        upstream = grid.take_queries("upstream", grad[b], chunk)
        values = grid.take_keys("values", value[b], chunk)
        picked = grid.gather(torch.bmm(upstream, values.mT, out=grid.scores("scores", chunk)), chunk)
        for run, kinds in chunk.runs:
            picked[run].masked_fill_(~grid.slot_table(kinds)[1], 0)
        grid.put_queries(grad_weights[b], chunk, picked)
        dense = grid.scatter(grid.take_queries("weights", weights[b], chunk), chunk)
        hidden = grid.chunk_hidden(chunk) if careful else None
        room = grid.room("grad_values", grid.keys, value.shape[2], chunk)
        grid.add_keys(grad_value[b], chunk, mix_transposed(dense, grid.clear_padding(upstream, chunk), hidden, room))
    return _unrows(grad_weights, grid), _unrows(grad_value, grid).to(value.dtype)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, N, C]` as contiguous `[B, N * H, C]`."""
    return tuple(x.transpose(1, 2).contiguous().flatten(1, 2) for x in tensors)


def _unrows(x: Tensor, grid: TiledGrid) -> Tensor:
    return x.unflatten(1, (-1, grid.heads)).transpose(1, 2)


class _Slots(TiledGrid):
    """Tiles whose columns are window slots; one KV head a query head."""

    def __init__(self, tensor: Tensor, windows: tuple[Window, ...]) -> None:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        super().__init__(windows, tensor.shape[1], 1, 0, tensor.device, dtype)
        self.slots = math.prod(window.kernel for window in windows)
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def slot_table(self, kinds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """`Tiling.slots` on the device."""
        if kinds not in self._tables:
            self._tables[kinds] = tuple(x.to(self.device) for x in self.tiles.slots(kinds))
        return self._tables[kinds]

    def slot_bias_places(self, kinds: tuple[int, ...]) -> Tensor:
        """Entries of the flattened table of relative positions, int64 `[size, slots]`."""
        return self.tiles.bias_places(kinds).to(self.device).gather(1, self.slot_table(kinds)[0])

    def gather(self, dense: Tensor, chunk: Chunk) -> Tensor:
        """`[rows, size, halo]` -> `[tiles, heads, 1, size, slots]`."""
        parts = self.parts(dense, chunk)
        out = self.parts(self.room("slots", self.queries, self.slots, chunk), chunk)
        for run, kinds in chunk.runs:
            torch.gather(parts[run], -1, self.slot_table(kinds)[0].expand_as(out[run]), out=out[run])
        return out

    def scatter(self, slots: Tensor, chunk: Chunk) -> Tensor:
        """The adjoint of `gather`; slots without a key are dropped."""
        dense = self.scores("dense", chunk).zero_()
        parts, given = self.parts(dense, chunk), self.parts(slots, chunk)
        for run, kinds in chunk.runs:
            places, real = self.slot_table(kinds)
            part = given[run].masked_fill(~real, 0)
            parts[run].scatter_add_(-1, places.expand_as(part), part)
        return dense
