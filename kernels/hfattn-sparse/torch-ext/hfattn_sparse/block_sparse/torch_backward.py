"""Backward over the chunks of one tile plan: weights are recomputed, nothing is larger than a chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiling import BlockTable, Chunk, TilePlan, TileRows, Workspace
from .torch_forward import NEG_INF, accumulator, add_bias, stable_exp

# Scores surely below this are recomputed without clamping them against their log-sum-exp first.
SAFE_SCORE = 30.0

# Two products a step more than the forward, so a larger chunk pays.
CHUNK_SCORES, CHUNK_KEYS = 1 << 21, 1 << 14


class Gradients:
    """Sums of the key, value and bias gradients as tables of blocks."""

    def __init__(self, keys: BlockTable, values: BlockTable, bias: BlockTable | None, dtype: torch.dtype) -> None:
        rows = keys.batch * keys.heads * keys.blocks
        self.key, self.value = (
            torch.zeros(rows, x.block * x.dim, dtype=dtype, device=x.device) for x in (keys, values)
        )
        self.bias = None if bias is None else torch.zeros_like(bias.table, dtype=dtype)


@dataclass(frozen=True)
class _Rows:
    """What the pieces of a chunk need of its query rows, [n, tile_rows, ...] each.

    Attributes:
        scored: query * scale, in the dtype in which the scores are computed.
        scaled: the same in the dtype of the other products.
        lse: subtracted from the scores, or None in the flat case: then the weights are exp(score) and `grad` and
            `delta` carry the factor exp(-lse), which saves a pass over the scores.
        grad_query: sum of the pieces, not yet times `scale`.
    """

    scored: Tensor
    scaled: Tensor
    grad: Tensor
    delta: Tensor
    lse: Tensor | None
    grad_query: Tensor


def explicit_backward(
    plan: TilePlan,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    keys: BlockTable,
    values: BlockTable,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: tuple[BlockTable, Tensor] | None,
    bound: float,
    careful: bool,
    small: bool,
    grads: Gradients,
    grad_query: Tensor,
) -> None:
    """Add to `grads` and write `grad_query`; the tensors are the rows of this plan.

    With p = exp(s - lse) and delta = out . grad_out - grad_lse: ds = p (grad_out . v - delta).

    Args:
        bound: no |score| is larger (infinite where there is a bias).
        careful: keep hidden keys from touching anything even when they hold NaN or infinities.
        small: do everything in fp64, with delta from the products themselves instead of the rounded `out`: where a row
            reads few keys ds is the small difference of large numbers.
    """
    dtype = torch.float64 if small else accumulator(query.dtype)
    # The gradient of a bias is fp32, so bf16 products will not do for it.
    low = query.dtype if query.dtype == torch.bfloat16 and bias is None and not small else dtype
    work, limit = Workspace(), torch.get_num_threads() * CHUNK_SCORES
    sums = _Sums(keys, values, bias, grads, careful, work)
    inputs = [None if x is None else TileRows(x, plan) for x in (query, grad_out, out, lse, grad_lse)]
    target = TileRows(grad_query, plan)
    longest = keys.blocks if small else max(1, limit // (plan.tile_rows * keys.block))
    for chunk in plan.chunks(limit, torch.get_num_threads() * CHUNK_KEYS, low):
        rows = _rows(chunk, inputs, scale, low, dtype, bound, small, keys.block, work)
        for piece in chunk.pieces(longest, keys.block):
            (_small_piece if small else _piece)(piece, rows, sums)
        target.put(chunk, rows.grad_query.mul_(scale))


def _rows(
    chunk: Chunk, inputs, scale: float, low, dtype, bound: float, small: bool, block: int, work: Workspace
) -> _Rows:
    query, grad_out, out, lse, grad_lse = inputs
    taken = query.take(chunk, dtype, work, "query")
    scored = torch.mul(taken, scale, out=work.get("rows", taken.shape, dtype, taken.device))
    scaled = scored if low == dtype else work.get("rows", scored.shape, low, scored.device).copy_(scored)
    grad = grad_out.take(chunk, dtype, work, "grad")
    lse = lse.take(chunk, dtype, work, "lse")
    if small:
        delta = torch.zeros_like(lse)
    else:
        delta = torch.mul(
            out.take(chunk, dtype, work, "out"), grad, out=work.get("delta", grad.shape, dtype, grad.device)
        )
        delta = delta.sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.take(chunk, dtype, work, "grad lse")
    # exp(score - inf) = 0: rows that saw nothing take no part.
    lse = lse.masked_fill(lse == NEG_INF, float("inf"))
    grad_query = work.get("grad query", scored.shape, dtype, scored.device).zero_()
    if small or not _is_flat(lse, chunk.local.shape[1] * block, bound, low):
        return _Rows(scored, scaled, grad.to(low), delta, lse, grad_query)
    shrink = (-lse).exp_()
    grad = torch.mul(grad, shrink[..., None], out=work.get("shrunk", grad.shape, dtype, grad.device))
    return _Rows(scaled, scaled, grad.to(low), delta.mul_(shrink), None, grad_query)


def _is_flat(lse: Tensor, keys: int, bound: float, low: torch.dtype) -> bool:
    """Whether the scores of a chunk may be exponentiated as they are.

    bf16 products round the scores themselves. That is of the order of rounding the weights, which bf16 does anyway, as
    long as the large weights belong to small scores.
    """
    if low != torch.bfloat16:
        return bound <= SAFE_SCORE
    limit = 8.0 + max(0.0, math.log(keys / 512))
    return bound <= 2 * SAFE_SCORE and bool(((lse <= limit) & (lse >= -8.0) | lse.isposinf()).all())


@dataclass(frozen=True)
class _Sums:
    """The tables that pieces read and the sums that they add to."""

    keys: BlockTable
    values: BlockTable
    bias: tuple[BlockTable, Tensor] | None
    grads: Gradients
    careful: bool
    work: Workspace

    def add(self, piece: Chunk, state: _Rows, weights, grad_scores, grad, key) -> None:
        """Add what one piece gives to every gradient; weights and grad_scores are [n, keys, rows]."""
        if self.careful:
            # 0 * NaN: hidden keys and rows must not receive or spread what they never took part in.
            grad_scores.masked_fill_(weights == 0, 0)
            key = key.nan_to_num(0.0, 0.0, 0.0)
        rows, work = piece.rows.reshape(-1), self.work
        self._add(self.grads.value, rows, work.bmm("product", weights, grad))
        self._add(self.grads.key, rows, work.bmm("product", grad_scores, state.scaled))
        state.grad_query.add_(work.bmm("product", grad_scores.mT, key))
        if self.bias is not None:
            rows = (piece.local + self.bias[1][piece.at, None]).view(-1)
            self._add(self.grads.bias, rows, grad_scores.sum(2))

    def _add(self, total: Tensor, rows: Tensor, part: Tensor) -> None:
        part = part.view(len(rows), *total.shape[1:])
        if part.dtype != total.dtype:
            part = self.work.get("product cast", part.shape, total.dtype, part.device).copy_(part)
        total.index_add_(0, rows, part)


def _piece(piece: Chunk, state: _Rows, sums: _Sums) -> None:
    """Weights from the lse that the forward left."""
    low, work = state.grad.dtype, sums.work
    scored = state.scored
    key = sums.keys.take(piece.rows, scored.dtype, work, "key")
    scores = work.bmm("scores", key, scored.mT)  # [n, keys, rows]
    if state.lse is None:
        weights = scores.exp_()
        if piece.edge:
            weights[:, -piece.edge :].mul_(piece.visible)
    else:
        add_bias(scores, piece, sums.bias, work)
        weights = stable_exp(scores.sub_(state.lse[:, None])).to(low)

    grad, delta = state.grad, state.delta[:, None]
    value = sums.values.take(piece.rows, low, work, "value")
    if low == torch.bfloat16:
        shape = (*value.shape[:2], grad.shape[1])
        grad_scores = work.get("grad scores", shape, low, grad.device)
        torch.baddbmm(-delta.to(low), value, grad.mT, out=grad_scores)
    else:
        grad_scores = work.bmm("grad scores", value, grad.mT).sub_(delta)
    grad_scores.mul_(weights)
    if key.dtype != low:
        key = sums.keys.take(piece.rows, low, work, "key")
    sums.add(piece, state, weights, grad_scores, grad, key)


def _small_piece(piece: Chunk, state: _Rows, sums: _Sums) -> None:
    """Weights and delta from the scores of the piece, which holds all keys of its rows."""
    low, work = state.grad.dtype, sums.work
    key, value = (t.take(piece.rows, low, work, n) for t, n in ((sums.keys, "key"), (sums.values, "value")))
    grad = state.grad
    scores = torch.bmm(key, state.scored.mT)
    add_bias(scores, piece, sums.bias, work)
    top = scores.amax(1, keepdim=True)
    weights = stable_exp(scores.sub_(top.masked_fill_(top == NEG_INF, 0)))
    total = weights.sum(1, keepdim=True)
    weights.div_(total.masked_fill_(total == 0, 1))

    grad_scores = torch.bmm(value, grad.mT)
    if sums.careful:
        grad_scores.masked_fill_(weights == 0, 0)
    grad_scores.mul_(weights)
    delta = grad_scores.sum(1, keepdim=True) + state.delta[:, None]
    grad_scores.addcmul_(weights, delta, value=-1)
    sums.add(piece, state, weights, grad_scores, grad, key)
