"""Neighborhood attention in plain torch: tiles of queries against the halo of keys that they share.

The scores of a few tiles at a time are one batched product, small enough to stay in cache; nothing of size N x N, and
no key list for each query, is ever formed. The backward computes the weights again.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .geometry import Window
from .torch_tiles import Chunk, TiledGrid, finite, mix, mix_transposed


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
    query, key, value = (x.contiguous() for x in (query, key, value))
    grid = _grid(query, key, windows)
    weights_of = _Weights(grid, rpb, key_mask, scale, careful=not finite(query, key, value))
    for b, chunk in itertools.product(range(len(query)), grid.chunks()):
        queries, keys = grid.take_queries("queries", query[b], chunk), grid.take_keys("keys", key[b], chunk)
        scores, hidden = weights_of.scores(b, chunk, queries, keys)
        top = scores.amax(-1, keepdim=True) if want_lse else None
        weights = weights_of.softmax(scores, hidden)
        mixed = grid.room("mixed", grid.queries, value.shape[3], chunk)
        mix(weights, grid.take_keys("values", value[b], chunk), hidden, mixed)
        grid.put_queries(out[b], chunk, mixed)
        if top is not None:
            # The largest weight is exp(top - lse); a row without keys has none.
            found = torch.where(top == float("-inf"), top, top - weights.amax(-1, keepdim=True).log())
            grid.put_queries(lse[b], chunk, found)
    return out, lse.squeeze(3) if want_lse else lse


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
    grads = [torch.zeros(x.shape, dtype=_wide(query), device=query.device) for x in (query, key, value)]
    if not query.numel():
        return *(x.to(query.dtype) for x in grads), None if rpb is None else torch.zeros_like(rpb)
    query, key, value, grad_out = (x.contiguous() for x in (query, key, value, grad_out))
    grid = _grid(query, key, windows)
    careful = not finite(query, key, value, grad_out)
    weights_of = _Weights(grid, rpb, key_mask, scale, careful=careful)
    bias = None if rpb is None else _BiasGradient(grid, rpb)
    for b, chunk in itertools.product(range(len(query)), grid.chunks()):
        queries = grid.take_queries("queries", query[b], chunk)
        keys, values = grid.take_keys("keys", key[b], chunk), grid.take_keys("values", value[b], chunk)
        scores, hidden = weights_of.scores(b, chunk, queries, keys)
        weights = weights_of.softmax(scores, hidden)
        # The padding of a tile repeats a query, which must not count twice.
        upstream = grid.clear_padding(grid.take_queries("upstream", grad_out[b], chunk), chunk)
        grad_values = grid.room("grad_values", grid.keys, value.shape[3], chunk)
        grid.add_keys(grads[2][b], chunk, mix_transposed(weights, upstream, hidden, grad_values))
        grad_scores = torch.bmm(upstream, values.mT, out=grid.scores("grad_scores", chunk))
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0)
        torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)
        if grad_lse is not None:
            of_lse = grid.take_queries("of_lse", grad_lse[b][..., None], chunk)
            grad_scores.addcmul_(weights, grid.clear_padding(of_lse, chunk))
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0)
        grad_queries = grid.room("grad_queries", grid.queries, query.shape[3], chunk)
        grid.add_queries(grads[0][b], chunk, mix(grad_scores, keys, hidden, grad_queries))
        grad_keys = grid.room("grad_keys", grid.keys, query.shape[3], chunk)
        grid.add_keys(grads[1][b], chunk, mix_transposed(grad_scores, queries, hidden, grad_keys))
        if bias is not None:
            bias.add(chunk, grad_scores)
    for grad in grads[:2]:
        grad.mul_(scale)
    return *(x.to(query.dtype) for x in grads), None if bias is None else bias.total.to(rpb.dtype)


class _Weights:
    """Scores of one call, a chunk of tiles at a time.

    careful: keys that are not finite must not reach, by 0 * inf, rows that do not see them.
    """

    def __init__(
        self, grid: TiledGrid, rpb: Tensor | None, key_mask: Tensor | None, scale: float, *, careful: bool
    ) -> None:
        self.grid, self.scale, self.careful = grid, scale, careful
        self.rpb = None if rpb is None else rpb.detach().to(grid.dtype).flatten(1).unflatten(0, (grid.heads, -1))
        self.key_bias = None
        if key_mask is not None:
            bias = torch.zeros(key_mask.shape, dtype=grid.dtype, device=grid.device)
            self.key_bias = bias.masked_fill_(~key_mask, float("-inf"))
        self._biases: dict[tuple[int, ...], Tensor | None] = {}

    def scores(self, b: int, chunk: Chunk, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masked scores `[rows, group * size, halo + M]`, and in careful calls what is hidden (bool, same shape)."""
        grid = self.grid
        scores = grid.scores("scores", chunk)
        parts = grid.parts(scores, chunk)
        biases = [(run, self._bias(kinds)) for run, kinds in grid.runs(chunk)]
        biased = any(bias is not None for _, bias in biases)
        for run, bias in biases if biased else ():
            parts[run] = 0 if bias is None else bias if self.rpb is None else bias[chunk.heads]
        torch.baddbmm(scores, queries, keys.mT, beta=int(biased), alpha=self.scale, out=scores)
        of_keys = None
        if self.key_bias is not None:
            of_keys = self.key_bias[b][chunk.mask_rows][:, None, None, None]
            parts += of_keys
        if not self.careful:
            return scores, None
        hidden = grid.chunk_hidden(chunk)
        if of_keys is not None:
            hidden_parts = grid.parts(hidden, chunk)
            hidden_parts |= of_keys < 0
        return scores.masked_fill_(hidden, float("-inf")), hidden

    def softmax(self, scores: Tensor, hidden: Tensor | None) -> Tensor:
        """Weights of every row, in the place of the scores; rows without keys get none, and in careful calls hidden
        keys of broken rows neither."""
        empty = None if self.key_bias is None else scores.amax(-1, keepdim=True) == float("-inf")
        weights = torch.softmax(scores, -1, out=scores)
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
        return weights if empty is None else weights.masked_fill_(empty, 0)

    def _bias(self, kinds: tuple[int, ...]) -> Tensor | None:
        """Mask and relative bias `[size, halo + M]`, with rpb `[Hkv, group, size, halo + M]`."""
        if kinds not in self._biases:
            bias = self.grid.mask_bias(kinds)
            if self.rpb is not None:
                places = self.grid.tiles.bias_places(kinds).to(self.grid.device)
                table = torch.nn.functional.pad(self.rpb[:, :, places], (0, self.grid.extra))
                bias = table if bias is None else table + bias
            self._biases[kinds] = bias
        return self._biases[kinds]


class _BiasGradient:
    """Gradient of rpb: gradients of scores summed by relative position."""

    def __init__(self, grid: TiledGrid, rpb: Tensor) -> None:
        self.grid = grid
        self.total = torch.zeros(rpb.shape, dtype=grid.dtype, device=rpb.device)
        self._flat = self.total.view(grid.heads, grid.group, -1)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def add(self, chunk: Chunk, grad_scores: Tensor) -> None:
        grid = self.grid
        parts = grid.parts(grad_scores, chunk)[..., : grid.tiles.halo]
        for run, kinds in grid.runs(chunk):
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
