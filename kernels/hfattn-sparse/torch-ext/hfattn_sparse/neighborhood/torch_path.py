"""Neighborhood attention in plain torch: tiles of queries against the halo of keys that they share.

The scores of a few tiles at a time are one batched product, small enough to stay in cache; nothing of size N x N, and
no key list for each query, is ever formed. The backward computes the weights again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Window
from .torch_tiles import Chunk, TiledGrid, finite, mix, transposed


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
    if not query.numel():
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        return out, query.new_zeros(query.shape[:3] if want_lse else 0, dtype=_wide(query))
    grid = _grid(query, key, windows)
    weights_of = _Weights(grid, query, key, value, rpb, key_mask, scale)
    values, more_values = grid.strips(value), grid.beside(value)
    shape = weights_of.queries.shape[:5]
    out = torch.empty(*shape, value.shape[3], dtype=grid.dtype, device=query.device)
    lse = torch.empty(*shape, dtype=grid.dtype, device=query.device) if want_lse else None
    for chunk in grid.chunks():
        scores, hidden = weights_of.scores(chunk)
        top = scores.amax(-1) if want_lse else None
        weights = weights_of.softmax(scores, hidden)
        mixed = mix(weights, grid.halo(values, more_values, chunk), hidden)
        out[chunk.outer][chunk.rows] = mixed.unflatten(0, chunk.shape)
        if want_lse:
            # The largest weight is exp(top - lse); a row without keys has none.
            found = torch.where(top == float("-inf"), top, top - weights.amax(-1).log())
            lse[chunk.outer][chunk.rows] = found.unflatten(0, chunk.shape)
    result = grid.from_tiles(out).to(query.dtype)
    if not want_lse:
        return result, query.new_empty(0, dtype=grid.dtype)
    return result, grid.from_tiles(lse)


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
    if not query.numel():
        return *(torch.zeros_like(x) for x in (query, key, value)), None if rpb is None else torch.zeros_like(rpb)
    grid = _grid(query, key, windows)
    weights_of = _Weights(grid, query, key, value, rpb, key_mask, scale, grad_out)
    values, more_values = grid.strips(value), grid.beside(value)
    upstream = grid.to_tiles(grad_out)
    of_lse = None if grad_lse is None else grid.to_tiles(grad_lse)
    real = grid.real_queries()
    if real is not None:
        # The padding of a tile repeats a query, which must not count twice.
        upstream = upstream * real
        of_lse = None if of_lse is None else of_lse * real[..., 0]
    grad_query = torch.empty_like(weights_of.queries)
    grad_keys, grad_values = torch.zeros_like(weights_of.keys), torch.zeros_like(values)
    more = [None if x is None else torch.zeros_like(x) for x in (weights_of.more_keys, more_values)]
    bias = None if rpb is None else _BiasGradient(grid, rpb)
    for chunk in grid.chunks():
        scores, hidden = weights_of.scores(chunk)
        weights = weights_of.softmax(scores, hidden)
        queries, keys = weights_of.tensors
        incoming = upstream[chunk.outer][chunk.rows].flatten(0, 2)
        held = grid.halo(values, more_values, chunk)
        grid.add_to_strips(grad_values, more[1], chunk, mix(weights.mT, incoming, transposed(hidden)))
        grad_weights = incoming @ held.mT
        if hidden is not None:
            grad_weights.masked_fill_(hidden, 0)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        if of_lse is not None:
            grad_scores.addcmul_(weights, of_lse[chunk.outer][chunk.rows].flatten(0, 2)[..., None])
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0)
        grad_query[chunk.outer][chunk.rows] = mix(grad_scores, keys, hidden).unflatten(0, chunk.shape)
        grid.add_to_strips(grad_keys, more[0], chunk, mix(grad_scores.mT, queries, transposed(hidden)))
        if bias is not None:
            bias.add(chunk, grad_scores)
    return (
        grid.from_tiles(grad_query.mul_(scale)).to(query.dtype),
        grid.fold(grad_keys, more[0]).to(key.dtype),
        grid.fold(grad_values, more[1]).to(value.dtype),
        None if bias is None else bias.total.to(rpb.dtype),
    )


class _Weights:
    """Scores of one call, a chunk of tiles at a time."""

    def __init__(
        self,
        grid: TiledGrid,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        *more: Tensor,
    ) -> None:
        self.grid = grid
        # A key that is not finite must not reach, by 0 * inf, rows that do not see it.
        self.careful = not finite(query, key, value, *more)
        self.queries = grid.to_tiles(query).mul_(scale)
        self.keys, self.more_keys = grid.strips(key), grid.beside(key)
        self.rpb = None if rpb is None else rpb.detach().to(grid.dtype).flatten(1).unflatten(0, (grid.heads, -1))
        self.key_hidden, self.more_hidden = None, None
        if key_mask is not None:
            hidden = torch.zeros(key_mask.shape, dtype=grid.dtype, device=key_mask.device)
            hidden = hidden.masked_fill_(~key_mask, float("-inf"))[..., None, None]
            self.key_hidden, self.more_hidden = grid.strips(hidden), grid.beside(hidden)
        self._biases: dict[tuple[int, ...], Tensor | None] = {}
        self.tensors: tuple[Tensor, Tensor]

    def scores(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Masked scores `[rows, group * size, halo + M]`, and in careful calls what is hidden (bool, same shape).

        Leaves the chunk's queries and keys in `tensors`.
        """
        grid = self.grid
        queries = self.queries[chunk.outer][chunk.rows].flatten(0, 2)
        keys = grid.halo(self.keys, self.more_keys, chunk)
        self.tensors = queries, keys
        scores = queries @ keys.mT
        parts = scores.view(*chunk.shape, grid.group, grid.tiles.size, grid.keys)
        for run, kinds in grid.runs(chunk):
            bias = self._bias(kinds)
            if bias is not None:
                parts[:, :, run] += bias if self.rpb is None else bias[chunk.heads]
        of_keys = None
        if self.key_hidden is not None:
            of_keys = self._of_keys(chunk)
            parts += of_keys
        return scores, self._hidden(chunk, scores, of_keys) if self.careful else None

    def softmax(self, scores: Tensor, hidden: Tensor | None) -> Tensor:
        """Weights of every row; rows without keys get none, and in careful calls hidden keys of broken rows neither."""
        weights = scores.softmax(-1)
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
        if self.key_hidden is not None:
            weights.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0)
        return weights

    def _bias(self, kinds: tuple[int, ...]) -> Tensor | None:
        """Mask and relative bias `[size, halo + M]`, with rpb `[Hkv, 1, group, size, halo + M]`."""
        if kinds not in self._biases:
            bias = self.grid.mask_bias(kinds)
            if self.rpb is not None:
                places = self.grid.tiles.bias_places(kinds).to(self.grid.device)
                table = torch.nn.functional.pad(self.rpb[:, :, places], (0, self.grid.extra))
                bias = (table if bias is None else table + bias)[:, None]
            self._biases[kinds] = bias
        return self._biases[kinds]

    def _of_keys(self, chunk: Chunk) -> Tensor:
        """-inf for hidden keys, `[batch, 1, tiles, 1, 1, halo + M]`."""
        one_head = Chunk(chunk.outer, chunk.kinds, chunk.halo, chunk.batch, slice(0, 1), chunk.tiles)
        rows = self.grid.halo(self.key_hidden, self.more_hidden, one_head)[..., 0]
        return rows.unflatten(0, one_head.shape)[:, :, :, None, None]

    def _hidden(self, chunk: Chunk, scores: Tensor, of_keys: Tensor | None) -> Tensor:
        grid = self.grid
        hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        parts = hidden.view(*chunk.shape, grid.group, grid.tiles.size, grid.keys)
        for run, kinds in grid.runs(chunk):
            parts[:, :, run] = grid.hidden(kinds)
        if of_keys is not None:
            parts |= of_keys < 0
        scores.masked_fill_(hidden, float("-inf"))
        return hidden


class _BiasGradient:
    """Gradient of rpb: gradients of scores summed by relative position."""

    def __init__(self, grid: TiledGrid, rpb: Tensor) -> None:
        self.grid = grid
        self.total = torch.zeros(rpb.shape, dtype=grid.dtype, device=rpb.device)
        self._flat = self.total.view(grid.heads, grid.group, -1)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def add(self, chunk: Chunk, grad_scores: Tensor) -> None:
        grid = self.grid
        parts = grad_scores.view(*chunk.shape, grid.group, grid.tiles.size, grid.keys)[..., : grid.tiles.halo]
        for run, kinds in grid.runs(chunk):
            if kinds not in self._places:
                self._places[kinds] = grid.tiles.bias_places(kinds).to(grid.device).flatten()
            # Masked pairs have no gradient, so the entry they name gets none.
            self._flat[chunk.heads].index_add_(2, self._places[kinds], parts[:, :, run].sum((0, 2)).flatten(2))


def _grid(query: Tensor, key: Tensor, windows: tuple[Window, ...]) -> TiledGrid:
    batch, tokens, heads = query.shape[:3]
    group = heads // key.shape[2]
    return TiledGrid(windows, batch, key.shape[2], group, key.shape[1] - tokens, query.device, _wide(query))


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
