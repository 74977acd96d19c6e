"""Neighborhood attention in plain torch: tiles of queries against the halo of keys that they share.

The scores of a few tiles at a time are one batched product, small enough to stay in cache; nothing of size N x N, and
no key list for each query, is ever formed. The backward computes the weights again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..counters import count
from . import native_path
from .geometry import Window
from .torch_tiles import Chunk, TiledGrid, finite, flat_rows, mix, mix_transposed

# Sums of exponentials that were not shifted by their maximum are used within these bounds: no weight that counts was
# lost below fp32's range, and there is room above for values.
LEAST, MOST = 1e-20, 1e20
# A larger relative bias could lift a lost weight back into that range.
LARGEST_BIAS = 20.0


class _OutOfRangeError(ArithmeticError):
    """Exponentials need a shift, or something is not finite."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    *,
    windows: tuple[Window, ...],
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `reference.forward`; without `want_lse` the second result is empty.

    Values that are not finite become NaN in the rows that see them and nothing in others.
    """
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty((*query.shape[:3], 1) if want_lse else 0, dtype=_wide(query))
    if not query.numel():
        return out, lse.flatten(2) if want_lse else lse
    if native_path.takes(query, key, value, rpb, key_mask, windows, scale):
        found = native_path.forward(query, key, value, rpb, windows, scale)
        if found is not None:
            count("neighborhood_attention", "torch: native")
            return found[0], found[1] if want_lse else lse
    tensors = [x.contiguous() for x in (query, key, value)]
    weights_of = _Weights(_grid(query, key, windows), rpb, key_mask, scale, *tensors)
    try:
        _forward(weights_of, *tensors, out, lse if want_lse else None)
    except _OutOfRangeError:
        weights_of.shift()
        _forward(weights_of, *tensors, out, lse if want_lse else None)
    return out, lse.squeeze(3) if want_lse else lse


def _forward(weights_of: _Weights, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Write out and lse."""
    grid = weights_of.grid
    for b, (q, k, v, o) in enumerate(zip(*(flat_rows(x) for x in (query, key, value, out)), strict=True)):
        for chunk in grid.chunks():
            queries, keys = grid.take_queries("queries", q, chunk), grid.take_keys("keys", k, chunk)
            found = weights_of(b, chunk, queries, keys, want_lse=lse is not None)
            # Values take the place of the keys, so that what is touched stays in cache.
            values, mixed = grid.take_keys("keys", v, chunk), grid.room("mixed", grid.queries, v.shape[1], chunk)
            mix_transposed(found.weights, values, found.hidden, mixed)
            if found.total is not None:
                if not finite(mixed):
                    raise _OutOfRangeError
                mixed.div_(found.total.mT)
            grid.put_queries(o, chunk, mixed)
            if lse is not None:
                grid.put_queries(lse[b].flatten(0, 1), chunk, found.lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    *,
    windows: tuple[Window, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and rpb."""
    tensors = [x.contiguous() for x in (query, key, value, grad_out)]
    weights_of = _Weights(_grid(query, key, windows), rpb, key_mask, scale, *tensors)
    if not finite(*tensors):
        weights_of.shift()
    try:
        grads, grad_rpb = _backward(weights_of, *tensors, grad_lse, rpb)
    except _OutOfRangeError:
        weights_of.shift()
        grads, grad_rpb = _backward(weights_of, *tensors, grad_lse, rpb)
    for grad in grads[:2]:
        grad.mul_(scale)
    return *(x.to(query.dtype) for x in grads), None if rpb is None else grad_rpb.to(rpb.dtype)


def _backward(
    weights_of: _Weights,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    rpb: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of query and key, both before the scale, value, and rpb."""
    grid = weights_of.grid
    grads = [torch.zeros(x.shape, dtype=grid.dtype, device=query.device) for x in (query, key, value)]
    bias = None if rpb is None else _BiasGradient(grid, rpb)
    for b, rows in enumerate(zip(*(flat_rows(x) for x in (query, key, value, grad_out, *grads)), strict=True)):
        q, k, v, g, grad_q, grad_k, grad_v = rows
        for chunk in grid.chunks() if q.numel() else ():
            queries, keys = grid.take_queries("queries", q, chunk), grid.take_keys("keys", k, chunk)
            found = weights_of(b, chunk, queries, keys)
            weights, hidden = found.weights if found.total is None else found.weights.div_(found.total), found.hidden
            # The padding of a tile repeats a query, which must not count twice.
            upstream = grid.clear_padding(grid.take_queries("upstream", g, chunk), chunk)
            of_keys = grid.room("of_keys", grid.keys, v.shape[1], chunk)
            grid.add_keys(grad_v, chunk, mix(weights, upstream, hidden, of_keys))
            values = grid.take_keys("values", v, chunk)
            grad_scores = torch.bmm(values, upstream.mT, out=grid.room("grad_scores", grid.keys, grid.queries, chunk))
            if hidden is not None:
                grad_scores.masked_fill_(hidden, 0)
            torch._softmax_backward_data(grad_scores, weights, 1, weights.dtype, grad_input=grad_scores)
            if grad_lse is not None:
                of_lse = grid.take_queries("of_lse", grad_lse[b].reshape(-1, 1), chunk)
                grad_scores.addcmul_(weights, grid.clear_padding(of_lse, chunk).mT)
            if hidden is not None:
                grad_scores.masked_fill_(hidden, 0)
            of_queries = grid.room("of_queries", grid.queries, q.shape[1], chunk)
            grid.add_queries(grad_q, chunk, mix_transposed(grad_scores, keys, hidden, of_queries))
            of_keys = grid.room("of_keys", grid.keys, k.shape[1], chunk)
            grid.add_keys(grad_k, chunk, mix(grad_scores, queries, hidden, of_keys))
            if bias is not None:
                bias.add(chunk, grad_scores)
    return grads, None if bias is None else bias.total


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Weights of one chunk.

    Args:
        weights: `[rows, halo + M, group * size]`, before the division by `total`.
        total: `[rows, 1, group * size]`; None where the weights add up to 1, or to 0 in rows without keys.
        hidden: pairs that are not seen, bool as the weights; None where they cannot do harm.
        lse: `[rows, 1, group * size]`, where asked for.
    """

    weights: Tensor
    total: Tensor | None
    hidden: Tensor | None
    lse: Tensor | None


class _Weights:
    """Attention weights of one call, a chunk of tiles at a time, keys by queries.

    Tried first are plain exponentials, multiplied by 0 where a query does not see the key: no search for the largest
    score and no -inf, which exp takes ten times as long for. Where their sums show that this was not enough, `shift`
    turns to softmax for the whole call.
    """

    def __init__(
        self, grid: TiledGrid, rpb: Tensor | None, key_mask: Tensor | None, scale: float, *tensors: Tensor
    ) -> None:
        self.grid, self.scale, self.key_mask = grid, scale, key_mask
        self.rpb = None if rpb is None else rpb.detach().to(grid.dtype).flatten(1).unflatten(0, (grid.heads, -1))
        # Rows without keys, which a key mask may leave, add up to 0 as lost exponentials do.
        self.plain = key_mask is None and (rpb is None or not rpb.numel() or float(rpb.abs().max()) <= LARGEST_BIAS)
        self._tensors, self._careful = tensors, None
        self._tables: dict[tuple[int, ...], Tensor | None] = {}

    def shift(self) -> None:
        """Use softmax from here on."""
        self.plain = False
        self._tables.clear()

    @property
    def careful(self) -> bool:
        """Keys that are not finite must not reach, by 0 * inf, rows that do not see them."""
        if self._careful is None:
            self._careful = not finite(*self._tensors)
        return self._careful

    def __call__(self, b: int, chunk: Chunk, queries: Tensor, keys: Tensor, *, want_lse: bool = False) -> _Chunk:
        """Weights of queries `[rows, group * size, D]` and keys `[rows, halo + M, D]`."""
        scores = self.grid.room("scores", self.grid.keys, self.grid.queries, chunk)
        parts = scores.view(*chunk.shape, self.grid.keys, self.grid.queries)
        if self.plain:
            return self._exponentials(chunk, queries, keys, scores, parts, want_lse)
        for run, kinds in chunk.runs:
            table = self._table(kinds, chunk)
            parts[run] = 0 if table is None else table
        torch.baddbmm(scores, keys, queries.mT, alpha=self.scale, out=scores)
        unseen = None if self.key_mask is None else ~self.key_mask[b][chunk.mask_rows][:, None, :, None]
        if unseen is not None:
            parts.masked_fill_(unseen, float("-inf"))
        hidden = None
        if self.careful:
            hidden = self.grid.chunk_hidden(chunk).mT.contiguous()
            if unseen is not None:
                hidden.view(parts.shape).logical_or_(unseen)
            scores.masked_fill_(hidden, float("-inf"))
        return self._softmax(scores, hidden, want_lse)

    def _exponentials(
        self, chunk: Chunk, queries: Tensor, keys: Tensor, scores: Tensor, parts: Tensor, want_lse: bool
    ) -> _Chunk:
        torch.baddbmm(scores, keys, queries.mT, beta=0, alpha=self.scale, out=scores).exp_()
        for run, kinds in chunk.runs:
            table = self._table(kinds, chunk)
            if table is not None:
                parts[run].mul_(table)
        total = scores.sum(1, keepdim=True)
        least, most = total.aminmax()
        if not (float(least) >= LEAST and float(most) <= MOST):
            raise _OutOfRangeError
        return _Chunk(scores, total, None, total.log() if want_lse else None)

    def _softmax(self, scores: Tensor, hidden: Tensor | None, want_lse: bool) -> _Chunk:
        top = scores.amax(1, keepdim=True) if want_lse or self.key_mask is not None else None
        weights = torch.softmax(scores, 1, out=scores)
        if hidden is not None:
            weights.masked_fill_(hidden, 0)  # broken rows have none that is a number
        if self.key_mask is not None:
            weights.masked_fill_(top == float("-inf"), 0)
        lse = None
        if want_lse:
            # The largest weight is exp(top - lse); a row without keys has none.
            lse = torch.where(top == float("-inf"), top, top - weights.amax(1, keepdim=True).log())
        return _Chunk(weights, None, hidden, lse)

    def _table(self, kinds: tuple[int, ...], chunk: Chunk) -> Tensor | None:
        """What tiles of these kinds add to scores, or multiply plain exponentials by: `[halo + M, group * size]`, with
        rpb `[heads of the chunk, halo + M, group * size]`; None for nothing."""
        if kinds not in self._tables:
            made = self.grid.mask_table(kinds, factors=self.plain) if self.rpb is None else self._bias_table(kinds)
            self._tables[kinds] = made
        table = self._tables[kinds]
        return table if self.rpb is None else table[chunk.heads]

    def _bias_table(self, kinds: tuple[int, ...]) -> Tensor:
        places = self.grid.tiles.bias_places(kinds).to(self.grid.device)
        table = torch.nn.functional.pad(self.rpb[:, :, places], (0, self.grid.extra))
        table.masked_fill_(self.grid.hidden(kinds), float("-inf"))
        table = table.permute(0, 3, 1, 2).flatten(2)
        return table.exp() if self.plain else table


class _BiasGradient:
    """Gradient of rpb: gradients of scores summed by relative position."""

    def __init__(self, grid: TiledGrid, rpb: Tensor) -> None:
        self.grid = grid
        self.total = torch.zeros(rpb.shape, dtype=grid.dtype, device=rpb.device)
        self._flat = self.total.view(grid.heads, grid.group, -1)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def add(self, chunk: Chunk, grad_scores: Tensor) -> None:
        grid = self.grid
        parts = grid.parts(grad_scores.mT.contiguous(), chunk)[..., : grid.tiles.halo]
        for run, kinds in chunk.runs:
            if kinds not in self._places:
                self._places[kinds] = grid.tiles.bias_places(kinds).to(grid.device).flatten()
            # Masked pairs have no gradient, so the entry they name gets none.
            self._flat[chunk.heads].index_add_(2, self._places[kinds], parts[run].sum(0).flatten(2))


def _grid(query: Tensor, key: Tensor, windows: tuple[Window, ...]) -> TiledGrid:
    tokens, heads = query.shape[1:3]
    group = heads // key.shape[2]
    return TiledGrid(windows, key.shape[2], group, key.shape[1] - tokens, query.device, _wide(query))


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
