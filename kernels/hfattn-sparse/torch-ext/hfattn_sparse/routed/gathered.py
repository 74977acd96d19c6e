"""Routed attention that computes only the chosen blocks, for all query heads of one key head at a time.

A row's own block is computed for whole runs of rows. All other pairs are sorted by key block: the rows that read a
block are gathered into a tile, multiplied with views of that block, and their results added back. Memory is linear in
the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .layout import Batch, Geometry, batch_segments, own_pieces, rows_by_block
from .workspace import Workspace

# Scores of one step: a megabyte of float32, which leaves room for the tiles beside it in a common second-level cache.
SCORES_PER_STEP = 1 << 18
# exp of scores within +-40 and their sums stay far inside the range of float32, so they need no running maximum.
SAFE_SCORE = 40.0
# Later scores may exceed the reference of their row by this much before it is raised.
SLACK = 60.0


class GatheredGroup:
    """The g query heads of one key head: forward and backward over own blocks and listed blocks.

    Rows of all g heads are numbered together, M = g * N of them: row r of head h is h * N + r.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        routes: torch.Tensor,
        shape: Geometry,
        work: Workspace,
    ) -> None:
        """query [M, D], key [n, B, D] times the scale, value [n, B, Dv], all of the computing type; routes [M, K]."""
        self.query, self.key, self.value = query, key, value
        self.shape, self.work, self.heads = shape, work, query.shape[0] // shape.q_len
        # exp is some ten times slower where its result underflows; this far down it no longer counts.
        self.lowest = math.ceil(math.log(torch.finfo(query.dtype).tiny))
        own = shape.own_block(query.device).repeat(self.heads)
        self.any_own = self.all_own = False
        if shape.causal:
            self.has_own = (routes == own[:, None]).any(-1).logical_and_(own >= 0)
            computed = self.has_own.view(self.heads, -1)[:, shape.first_row :]
            self.any_own, self.all_own = bool(computed.any()), bool(computed.all())
        self.listed, self.bounds = rows_by_block(routes, own, shape.num_blocks)

    def forward(self, acc: torch.Tensor, lse: torch.Tensor) -> None:
        """Fill acc [M, Dv] with the result, in the computing type, and lse [M]."""
        longest = [torch.linalg.vector_norm(rows, dim=-1).amax() for rows in (self.query, self.key)]
        self.bounded = bool(longest[0] * longest[1] <= SAFE_SCORE)
        self.acc, self.total = acc, lse  # lse holds the sum of the weights until the end
        self.reference = torch.full_like(lse, 0.0 if self.bounded else -torch.inf)
        untouched = self.shape.first_row if self.all_own else self.shape.q_len  # by the own-block step
        for tensor in (acc, lse):
            tensor.view(self.heads, self.shape.q_len, -1)[:, :untouched].zero_()
        if self.any_own:
            self._forward_own()
        for batch in self._batches(SCORES_PER_STEP):
            self._forward_batch(batch)
        acc.div_(self.total.masked_fill(self.total == 0, 1.0)[:, None])
        lse.log_().add_(self.reference)

    def _forward_own(self) -> None:
        for rows, query, _, key, value in self._own_tiles():
            scores = self._product(query, key, "scores")
            if not self.bounded:
                scores.add_(self._future_bias(*scores.shape[1:]))
                peak = scores.amax(-1, keepdim=True)
                scores.sub_(peak).clamp_min_(self.lowest)
                self.reference[rows] = peak.view(-1)
            scores.exp_().tril_(scores.shape[2] - scores.shape[1])
            torch.sum(scores, -1, out=self.total[rows].view(scores.shape[:2]))
            torch.bmm(scores, value, out=self.acc[rows].view(*scores.shape[:2], -1))
        if not self.all_own:
            self.acc.mul_(self.has_own[:, None])
            self.total.mul_(self.has_own)
            if not self.bounded:
                self.reference.masked_fill_(~self.has_own, -torch.inf)

    def _future_bias(self, height: int, width: int) -> torch.Tensor:
        """[L, W]: finite, but so low that a future key is never the maximum of a row."""
        bias = self._buffer("future", (height, width)).fill_(torch.finfo(self.query.dtype).min / 2)
        return bias.triu_(width - height + 1)

    def _forward_batch(self, batch: Batch) -> None:
        rows, query, key, value, _, real = self._gather(batch)
        scores = self._product(query, key, "scores")
        if not self.bounded:
            self._raise_references(scores, rows)
            scores.sub_(self.reference.index_select(0, rows).view(*scores.shape[:2], 1)).clamp_min_(self.lowest)
        scores.exp_()
        total = scores.sum(-1).view(-1)
        added = torch.bmm(scores, value, out=self._buffer("added", (*scores.shape[:2], value.shape[-1])))
        self._add_rows(self.acc, rows, added.view(-1, value.shape[-1]), real)
        self._add_rows(self.total, rows, total, real)

    def _raise_references(self, scores: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows with a score far above their reference (or without one) take the new maximum; rescale what they have."""
        peak = scores.amax(-1).view(-1)
        behind = (peak > self.reference.index_select(0, rows) + SLACK).nonzero().view(-1)
        if not behind.numel():
            return
        rows, peak = rows.index_select(0, behind), peak.index_select(0, behind)
        old = self.reference.clone()
        self.reference.scatter_reduce_(0, rows, peak, "amax")  # a row may be here twice, for two blocks
        changed = (self.reference != old).nonzero().view(-1)
        factor = (old.index_select(0, changed) - self.reference.index_select(0, changed)).exp_()
        self.total[changed] = self.total.index_select(0, changed).mul_(factor)
        self.acc.index_copy_(0, changed, self.acc.index_select(0, changed).mul_(factor[:, None]))

    def backward(
        self,
        grad_out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_query: torch.Tensor,
        grad_key: torch.Tensor,
        grad_value: torch.Tensor,
    ) -> None:
        """Fill grad_query [M, D], grad_key [n, B, D] (still without the scale) and grad_value [n, B, Dv].

        grad_out [M, Dv]; lse [M], +inf for rows that see nothing; delta [M]; all of the computing type.
        """
        for grad in (grad_query, grad_key, grad_value):
            grad.zero_()
        if self.any_own:
            for rows, query, blocks, key, value in self._own_tiles():
                shape = query.shape[:2]
                terms = grad_out[rows].view(*shape, -1), lse[rows].view(shape), delta[rows].view(shape)
                visible = None if self.all_own else self.has_own[rows].view(*shape, 1)
                dq, dk, dv = self._grad_tile(query, key, value, *terms, own=True, visible=visible)
                grad_query[rows] = dq
                grad_key[blocks, : key.shape[1]] += dk
                grad_value[blocks, : key.shape[1]] += dv
        for batch in self._batches(SCORES_PER_STEP // 2):
            rows, query, key, value, blocks, real = self._gather(batch)
            shape = query.shape[:2]
            grad = torch.index_select(grad_out, 0, rows, out=self._buffer("grad_rows", (rows.numel(), value.shape[-1])))
            if real is not None:  # rows of zeros add nothing to the gradients of keys and values
                grad.mul_(real[:, None])
                query.view(-1, query.shape[-1]).mul_(real[:, None])
            terms = lse.index_select(0, rows).view(shape), delta.index_select(0, rows).view(shape)
            dq, dk, dv = self._grad_tile(query, key, value, grad.view(*shape, -1), *terms)
            self._add_rows(grad_query, rows, dq, real)
            if blocks is None:
                grad_key[batch.blocks[0], : key.shape[1]] += dk[0]
                grad_value[batch.blocks[0], : key.shape[1]] += dv[0]
            else:
                grad_key.index_add_(0, blocks, dk)
                grad_value.index_add_(0, blocks, dv)

    def _grad_tile(self, query, key, value, grad_out, lse, delta, *, own=False, visible=None):
        """Gradients of tiles: query [c, L, D], key [c, W, D], value, grad_out [c, L, Dv], lse, delta [c, L].

        own: causal, within one block; visible: bool [c, L, 1], rows that read this block at all.

        Returns dq [c * L, D], dk [c, W, D], dv [c, W, Dv] in scratch memory.
        """
        weights = self._product(query, key, "scores")
        # The upper bound is for pairs that are masked below; all others are at most about 0.
        weights.sub_(lse[..., None]).clamp_(self.lowest, 1.0).exp_()
        if own:
            weights.tril_(weights.shape[2] - weights.shape[1])
        if visible is not None:
            weights.mul_(visible)
        dv = torch.bmm(weights.transpose(1, 2), grad_out, out=self._buffer("dv", value.shape))
        slope = self._product(grad_out, value, "slope").sub_(delta[..., None]).mul_(weights)
        dq = torch.bmm(slope, key, out=self._buffer("dq", query.shape))
        dk = torch.bmm(slope.transpose(1, 2), query, out=self._buffer("dk", key.shape))
        return dq.view(-1, dq.shape[-1]), dk, dv

    def _batches(self, scores: int) -> list[Batch]:
        last = self.shape.num_blocks - 1
        partial = last if self.shape.block_width(last) < self.shape.block_size else -1
        return batch_segments(self.bounds, max(1, scores // self.shape.block_size), alone=partial)

    def _own_tiles(self) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor, torch.Tensor]]:
        """Yield (rows, query [c, L, D], blocks, key [c, W, D], value [c, W, Dv]) of the own-block step.

        Row i of a tile sees the first W - L + i + 1 keys of it.
        """
        for head in range(self.heads):
            for piece in own_pieces(self.shape, SCORES_PER_STEP):
                start = head * self.shape.q_len + piece.row
                rows = slice(start, start + piece.count * piece.height)
                blocks = slice(piece.block, piece.block + piece.count)
                query = self.query[rows].view(piece.count, piece.height, -1)
                yield rows, query, blocks, self.key[blocks, : piece.width], self.value[blocks, : piece.width]

    def _gather(self, batch: Batch):
        """Rows [c * L], query [c, L, D], key [c, W, D], value [c, W, Dv], blocks [c] and real rows of a batch.

        Blocks is None for a single block; real is bool [c * L], False for padding, or None if there is none.
        """
        rows, real = batch.rows(self.listed)
        pieces, dim = len(batch.blocks), self.query.shape[-1]
        query = torch.index_select(self.query, 0, rows, out=self._buffer("rows", (rows.numel(), dim)))
        query = query.view(pieces, -1, dim)
        if pieces == 1:
            block, width = batch.blocks[0], self.shape.block_width(batch.blocks[0])
            return rows, query, self.key[block : block + 1, :width], self.value[block : block + 1, :width], None, real
        blocks = torch.tensor(batch.blocks, device=rows.device)
        key = torch.index_select(self.key, 0, blocks, out=self._buffer("keys", (pieces, *self.key.shape[1:])))
        value = torch.index_select(self.value, 0, blocks, out=self._buffer("values", (pieces, *self.value.shape[1:])))
        return rows, query, key, value, blocks, real

    def _add_rows(
        self, target: torch.Tensor, rows: torch.Tensor, source: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """target[rows] += source without the padding. A row that occurs twice gets both."""
        if real is not None:
            source.masked_fill_(~real if source.dim() == 1 else ~real[:, None], 0.0)
        target.index_add_(0, rows, source)

    def _product(self, left: torch.Tensor, right: torch.Tensor, name: str) -> torch.Tensor:
        """[c, L, D], [c, W, D] -> [c, L, W] in scratch memory."""
        out = self._buffer(name, (*left.shape[:2], right.shape[1]))
        return torch.bmm(left, right.transpose(1, 2), out=out)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.work.take(name, tuple(shape), self.query.dtype)
