"""Routed attention that is not causal, on a CPU: the rows that read a block go through torch's flash kernel together.

For every head and key block the rows that chose it are gathered into a tile, attend to the block by the fused kernel,
and are added back weighted by their share of the softmax. Half precision stays half precision inside a tile; sums over
tiles are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .layout import Geometry
from .workspace import Workspace

# exp of log-sums within +-40 and their sums stay far inside the range of float32, so they need no reference.
SAFE_SCORE = 40.0
# A later log-sum may exceed the reference of its row by this much before it is raised.
SLACK = 60.0


def can_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Geometry) -> bool:
    """Whether the kernel takes these tensors; a causal tile would need a mask, which it does not."""
    return not shape.causal and query.shape[-1] == value.shape[-1] and query.device.type == "cpu"


def mask_of(routes: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Bool `[B, Hq, Nq, n]` of int routes `[B, Hq, Nq, K]`, which may hold -1; bool ones are that mask already."""
    if routes.dtype == torch.bool:
        return routes
    mask = routes.new_zeros(*routes.shape[:3], num_blocks + 1, dtype=torch.bool)
    mask.scatter_(3, torch.where(routes < 0, num_blocks, routes).long(), True)
    return mask[..., :num_blocks]


def routes_of(mask: torch.Tensor) -> torch.Tensor:
    """Int32 routes `[B, Hq, Nq, n]`, -1 where the mask is False."""
    numbers = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    return torch.where(mask, numbers, -1)


def forward(query, key, value, routes, shape: Geometry, scale: float, out, lse, work: Workspace) -> None:
    """Fill out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`; routes int or bool."""
    for b, h, kv, listed, bounds in _heads(routes, shape, query.shape[1] // key.shape[1]):
        rows = _contiguous(query[b, h], "query", work)
        keys, values = _contiguous(key[b, kv], "key", work), _contiguous(value[b, kv], "value", work)
        longest = [torch.linalg.vector_norm(x, dim=-1, dtype=lse.dtype).amax() for x in (rows, keys)]
        head = _Head(listed, bounds, shape, scale, bool(longest[0] * longest[1] * scale <= SAFE_SCORE), work)
        head.forward(rows, keys, values, out[b, h], lse[b, h])


class _Head:
    """Rows by block of one head."""

    def __init__(self, listed, bounds, shape: Geometry, scale: float, bounded: bool, work: Workspace) -> None:
        self.listed, self.bounds, self.shape = listed, bounds, shape
        self.scale, self.bounded, self.work = scale, bounded, work

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor, slice]]:
        """Place in the list, rows int64 and keys of every block that is read by any."""
        size = self.shape.block_size
        for block, (start, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if end > start:
                place = slice(start, end)
                yield place, self.listed[place], slice(block * size, min((block + 1) * size, self.shape.k_len))

    def forward(self, query, key, value, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Fill out [N, Dv] and lse [N] of this head."""
        direct = out.dtype == lse.dtype and out.is_contiguous()
        self.acc = (out if direct else self.work.take("acc", tuple(out.shape), lse.dtype)).zero_()
        self.total = torch.zeros_like(lse)
        self.reference = torch.full_like(lse, 0.0 if self.bounded else -torch.inf)
        weights = self.work.take("weights", tuple(self.listed.shape), lse.dtype)
        for place, rows, keys in self.tiles():
            picked = _picked(query, rows, "rows", self.work)
            part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                picked[None, None], key[None, None, keys], value[None, None, keys], 0.0, False, scale=self.scale
            )
            self._add(rows, part[0, 0], sums[0, 0].to(lse.dtype), weights[place])
        if self.bounded:
            self.total.index_add_(0, self.listed, weights)
        self.acc.div_(self.total.masked_fill(self.total == 0, 1.0)[:, None])
        if not direct:
            out.copy_(self.acc)
        torch.log(self.total, out=lse)
        lse.add_(self.reference)

    def _add(self, rows: torch.Tensor, part: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor) -> None:
        """Add results [c, Dv] with log-sums [c] to their rows, and leave their weights [c] behind."""
        if not self.bounded:
            self._raise_references(rows, sums)
            sums = sums - self.reference.index_select(0, rows)
        torch.exp(sums, out=weight)
        part = part.mul_(weight[:, None]) if part.dtype == weight.dtype else part * weight[:, None]
        self.acc.index_add_(0, rows, part)
        if not self.bounded:  # the next tile may rescale it
            self.total.index_add_(0, rows, weight)

    def _raise_references(self, rows: torch.Tensor, sums: torch.Tensor) -> None:
        """Rows whose log-sum is far above their reference (or that have none) take it; what they have is rescaled."""
        reference = self.reference.index_select(0, rows)
        behind = (sums > reference + SLACK).nonzero().view(-1)
        if not behind.numel():
            return
        changed, higher = rows.index_select(0, behind), sums.index_select(0, behind)
        factor = (reference.index_select(0, behind) - higher).exp_()
        self.reference[changed] = higher
        self.total[changed] = self.total.index_select(0, changed).mul_(factor)
        self.acc.index_copy_(0, changed, self.acc.index_select(0, changed).mul_(factor[:, None]))


def backward(
    grad_out, query, key, value, routes, shape: Geometry, scale: float, out, lse, grads, work: Workspace
) -> None:
    """Fill grads = (dq, dk, dv): the kernel's own backward, given the result and the lse over all blocks."""
    dtype = lse.dtype
    sums = [work.take(name, tuple(x.shape[2:]), dtype) for name, x in (("dq", query), ("dk", key), ("dv", value))]
    group = query.shape[1] // key.shape[1]
    for b, h, kv, listed, bounds in _heads(routes, shape, group):
        head = _Head(listed, bounds, shape, scale, True, work)
        tensors = query[b, h], key[b, kv], value[b, kv], grad_out[b, h], out[b, h]
        names = "query", "key", "value", "grad", "result"
        rows_of = [_contiguous(x, name, work) for x, name in zip(tensors, names, strict=True)]
        sums[0].zero_()
        if h % group == 0:
            sums[1].zero_()
            sums[2].zero_()
        for _, rows, keys in head.tiles():
            picked, grad, result = (_picked(rows_of[i], rows, names[i] + " rows", work) for i in (0, 3, 4))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[None, None], picked[None, None], rows_of[1][None, None, keys], rows_of[2][None, None, keys],
                result[None, None], lse[b, h].index_select(0, rows)[None, None], 0.0, False, scale=scale,
            )  # fmt: skip
            sums[0].index_add_(0, rows, dq[0, 0].to(dtype))
            sums[1][keys] += dk[0, 0]
            sums[2][keys] += dv[0, 0]
        grads[0][b, h] = sums[0]
        if h % group == group - 1:
            grads[1][b, kv], grads[2][b, kv] = sums[1], sums[2]


def can_run_backward(query, key, value, grad_lse: torch.Tensor | None, shape: Geometry) -> bool:
    """The kernel has no gradient of lse."""
    return grad_lse is None and can_run(query, key, value, shape)


def _heads(
    routes: torch.Tensor, shape: Geometry, group: int
) -> Iterator[tuple[int, int, int, torch.Tensor, list[int]]]:
    """Yield (batch, head, key head, rows int64 by block, n + 1 bounds of the blocks' segments)."""
    mask = mask_of(routes, shape.num_blocks)
    numbers = torch.arange(shape.num_blocks + 1)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            # [pairs] each, by block; much faster than sums of a bool tensor, which are taken in int64.
            block, row = mask[b, h].T.contiguous().nonzero().T.contiguous()
            yield b, h, h // group, row, torch.searchsorted(block, numbers).tolist()


def _contiguous(tensor: torch.Tensor, name: str, work: Workspace) -> torch.Tensor:
    """[N, D] of any strides with contiguous rows: gathering rows of a strided tensor is several times slower."""
    return tensor if tensor.is_contiguous() else work.take(name, tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _picked(tensor: torch.Tensor, rows: torch.Tensor, name: str, work: Workspace) -> torch.Tensor:
    out = work.take(name, (rows.numel(), tensor.shape[-1]), tensor.dtype)
    return torch.index_select(tensor, 0, rows, out=out)
