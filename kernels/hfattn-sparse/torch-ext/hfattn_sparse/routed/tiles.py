"""Routed attention as masked tiles: every visible score is computed, and the choice of blocks is a mask on it.

For routes that keep most pairs. No gathering: tiles of rows run over views of the keys, the mask is one number per
row and block. Without routes it is plain (causal) attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .layout import Geometry
from .workspace import Workspace

SCORES_PER_STEP = 1 << 18
ROWS_PER_TILE = 128
KEYS_PER_STEP = 1024
# exp of scores within +-40 and their sums stay far inside the range of float32, so they need no running maximum.
SAFE_SCORE = 40.0


@dataclass(frozen=True)
class Tile:
    """Rows `start` .. `end` of query heads `heads`, all of which read the key heads `kv` of one batch entry."""

    batch: int
    heads: slice
    kv: slice
    start: int
    end: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, Hq, Nq, ...] -> [Hq, rows, ...] of this tile."""
        return tensor[self.batch, self.heads, self.start : self.end]


class _Tiles:
    """Sizes, key heads and masks of one call."""

    def __init__(self, query, key, value, routes, shape: Geometry, scale: float, work: Workspace) -> None:
        self.query, self.key, self.value, self.routes = query, key, value, routes
        self.shape, self.scale, self.work = shape, scale, work
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.lowest = math.ceil(math.log(torch.finfo(self.dtype).tiny))  # exp is slow where its result underflows
        self.group = query.shape[1] // key.shape[1]
        rows = max(1, min(ROWS_PER_TILE, shape.q_len - shape.first_row))
        step = min(shape.k_len, max(KEYS_PER_STEP, SCORES_PER_STEP // (self.group * rows)))
        self.step = step if step < shape.block_size else step // shape.block_size * shape.block_size
        self.rows = max(min(rows, 16), min(rows, SCORES_PER_STEP // self.step // self.group))
        self.kv_heads = max(1, min(key.shape[1], SCORES_PER_STEP // self.step // (self.group * self.rows)))

    def head_groups(self) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
        """Yield (batch, key heads, key [h, Nk, D] times the scale, value [h, Nk, Dv]) in the computing type."""
        for b in range(self.key.shape[0]):
            for h in range(0, self.key.shape[1], self.kv_heads):
                kv = slice(h, min(h + self.kv_heads, self.key.shape[1]))
                key = self._buffer("key", self.key[b, kv].shape).copy_(self.key[b, kv]).mul_(self.scale)
                value = self.value[b, kv].to(self.dtype)
                yield b, kv, key, value if value.stride(-1) == 1 else value.contiguous()

    def of_group(self, batch: int, kv: slice) -> Iterator[Tile]:
        heads = slice(kv.start * self.group, kv.stop * self.group)
        for start in range(self.shape.first_row, self.shape.q_len, self.rows):
            yield Tile(batch, heads, kv, start, min(start + self.rows, self.shape.q_len))

    def stack(self, tile: Tile, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """[B, Hq, Nq, D] -> [h, g * T, D] in scratch memory: the rows of all query heads of a key head."""
        part = tile.of(tensor)
        return self._buffer(name, part.shape).copy_(part).view(-1, self.group * part.shape[1], part.shape[2])

    def unstack(self, tile: Tile, stacked: torch.Tensor) -> torch.Tensor:
        """[h, g * T, ...] -> [Hq, T, ...]"""
        return stacked.reshape(-1, tile.end - tile.start, *stacked.shape[2:])

    def chosen(self, tile: Tile) -> torch.Tensor | None:
        """[h, g * T, n]: 1 where a row reads a block, else 0."""
        if self.routes is None:
            return None
        routes = tile.of(self.routes).long()
        count = self.shape.num_blocks
        mask = self._buffer("mask", (*routes.shape[:2], count + 1)).zero_()
        mask.scatter_(-1, torch.where(routes < 0, count, routes), 1.0)
        return mask[..., :count].reshape(-1, self.group * routes.shape[1], count)

    def spans(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """Ranges of keys up to the last one that the tile sees."""
        end = tile.end + self.shape.offset if self.shape.causal else self.shape.k_len
        for low in range(0, end, self.step):
            yield low, min(low + self.step, end)

    def scores(self, query: torch.Tensor, key: torch.Tensor, span: tuple[int, int], name: str) -> torch.Tensor:
        """[h, g * T, D] with keys of a span -> [h, g * T, W] in scratch memory."""
        out = self._buffer(name, (*query.shape[:2], span[1] - span[0]))
        return torch.bmm(query, key[:, span[0] : span[1]].transpose(1, 2), out=out)

    def hide(self, weights: torch.Tensor, tile: Tile, span: tuple[int, int], chosen: torch.Tensor | None) -> None:
        """Set the weights of pairs that are in the future or in blocks not chosen to zero."""
        if chosen is not None:
            self._per_block(weights, span, chosen, torch.Tensor.mul_)
        diagonal = tile.start + self.shape.offset - span[0]
        if self.shape.causal and diagonal < weights.shape[-1] - 1:
            weights.view(-1, tile.end - tile.start, weights.shape[-1]).tril_(diagonal)

    def lower(self, scores: torch.Tensor, tile: Tile, span: tuple[int, int], chosen: torch.Tensor | None) -> None:
        """Push the scores that `hide` would drop far below all others, but not to -inf."""
        far = torch.finfo(self.dtype).min / 4
        if chosen is not None:
            self._per_block(scores, span, (1 - chosen).mul_(far), torch.Tensor.add_)
        diagonal = tile.start + self.shape.offset - span[0]
        rows, width = tile.end - tile.start, scores.shape[-1]
        if self.shape.causal and diagonal < width - 1:
            bias = self._buffer("future", (rows, width)).fill_(far).triu_(diagonal + 1)
            scores.view(-1, rows, width).add_(bias)

    def _per_block(self, scores: torch.Tensor, span: tuple[int, int], per_block: torch.Tensor, apply) -> None:
        """apply(scores [..., W], per_block [..., n]) with the number of each key's block."""
        size, (low, high) = self.shape.block_size, span
        if low % size == 0 and high % size == 0:
            apply(scores.unflatten(-1, (-1, size)), per_block[..., low // size : high // size, None])
            return
        block = torch.arange(low, high, device=scores.device).div_(size, rounding_mode="floor")
        apply(scores, per_block.index_select(-1, block))

    def _buffer(self, name: str, shape) -> torch.Tensor:
        return self.work.take(name, tuple(shape), self.dtype)


def forward(query, key, value, routes, shape, scale, out, lse, work) -> None:
    """Fill out [B, Hq, Nq, Dv] and lse [B, Hq, Nq]; routes None: all visible keys."""
    out[:, :, : shape.first_row] = 0
    lse[:, :, : shape.first_row] = -torch.inf
    plan = _Tiles(query, key, value, routes, shape, scale, work)
    for b, kv, keys, values in plan.head_groups():
        heads = slice(kv.start * plan.group, kv.stop * plan.group)
        longest = torch.linalg.vector_norm(query[b, heads], dim=-1, dtype=plan.dtype).amax()
        bounded = bool(longest * torch.linalg.vector_norm(keys, dim=-1).amax() <= SAFE_SCORE)
        for tile in plan.of_group(b, kv):
            result, total = _forward_tile(plan, tile, keys, values, bounded)
            tile.of(out).copy_(plan.unstack(tile, result))
            tile.of(lse).copy_(plan.unstack(tile, total))


def _forward_tile(
    plan: _Tiles, tile: Tile, key: torch.Tensor, value: torch.Tensor, bounded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [h, g * T, Dv] and lse [h, g * T] of one tile."""
    query, chosen = plan.stack(tile, plan.query, "query"), plan.chosen(tile)
    acc = plan.work.take("acc", (*query.shape[:2], value.shape[-1]), plan.dtype).zero_()
    total = query.new_zeros(query.shape[:2])
    peak = torch.zeros_like(total) if bounded else torch.full_like(total, torch.finfo(plan.dtype).min / 2)
    for span in plan.spans(tile):
        weights = plan.scores(query, key, span, "scores")
        if not bounded:
            plan.lower(weights, tile, span, chosen)
            higher = torch.maximum(peak, weights.amax(-1))
            factor = (peak - higher).exp_()
            weights.sub_(higher[..., None]).clamp_min_(plan.lowest)
            acc.mul_(factor[..., None])
            total.mul_(factor)
            peak = higher
        plan.hide(weights.exp_(), tile, span, chosen)
        total.add_(weights.sum(-1))
        acc.baddbmm_(weights, value[:, span[0] : span[1]])
    lse = total.log().add_(peak)
    return acc.div_(total.masked_fill_(total == 0, 1.0)[..., None]), lse


def backward(grad_out, grad_lse, query, key, value, routes, shape, scale, out, lse, grads, work) -> None:
    """Fill grads = (dq, dk, dv)."""
    grad_query, grad_key, grad_value = grads
    grad_query[:, :, : shape.first_row] = 0
    plan = _Tiles(query, key, value, routes, shape, scale, work)
    for b, kv, keys, values in plan.head_groups():
        key_sum = work.take("grad_key", tuple(keys.shape), plan.dtype).zero_()
        value_sum = work.take("grad_value", tuple(values.shape), plan.dtype).zero_()
        for tile in plan.of_group(b, kv):
            grad = plan.stack(tile, grad_out, "grad_out")
            delta = torch.linalg.vecdot(grad, plan.stack(tile, out, "out"))
            if grad_lse is not None:
                delta -= tile.of(grad_lse).reshape(delta.shape)
            row_lse = tile.of(lse).reshape(delta.shape)
            empty = row_lse == -torch.inf
            terms = row_lse.masked_fill(empty, torch.inf), delta.masked_fill_(empty, 0.0)
            dq = _backward_tile(plan, tile, keys, values, grad, *terms, key_sum, value_sum)
            tile.of(grad_query).copy_(plan.unstack(tile, dq))
        grad_key[b, kv] = key_sum.mul_(scale)
        grad_value[b, kv] = value_sum


def _backward_tile(
    plan: _Tiles,
    tile: Tile,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> torch.Tensor:
    """Add to grad_key (without the scale) and grad_value [h, Nk, ...]; return dq [h, g * T, D] of one tile."""
    query, chosen = plan.stack(tile, plan.query, "query"), plan.chosen(tile)
    grad_query = plan.work.take("grad_query", tuple(query.shape), plan.dtype).zero_()
    for span in plan.spans(tile):
        keys = slice(*span)
        weights = plan.scores(query, key, span, "scores")
        # The upper bound is for pairs that are hidden next; all others are at most about 0.
        weights.sub_(lse[..., None]).clamp_(plan.lowest, 1.0).exp_()
        plan.hide(weights, tile, span, chosen)
        grad_value[:, keys].baddbmm_(weights.transpose(1, 2), grad_out)
        slope = plan.scores(grad_out, value, span, "slope").sub_(delta[..., None]).mul_(weights)
        grad_query.baddbmm_(slope, key[:, keys])
        grad_key[:, keys].baddbmm_(slope.transpose(1, 2), query)
    return grad_query
