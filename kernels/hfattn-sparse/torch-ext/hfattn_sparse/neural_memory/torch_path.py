"""Neural memory a chunk at a time: all gradients of a chunk in one pass, its per-token weights never formed.

Within a chunk the gradients are taken at one set of weights, so W_t = beta_t W + f_t S - sum_s G[t, s] a_s^T delta_s,
and x W_t is three products of matrices (`coefficients` has beta, f and G). Only chunks follow one another. The code is
plain differentiable torch: autograd gives the second-order terms of the outer gradient exactly.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardshrink

from .coefficients import Coefficients, coefficients
from .network import inner_gradient, read

Weights = list[Tensor]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
    offset: int,
    chunk: int,
    mask: Tensor | None,
    before: bool,
    begun: bool = False,
    **loss: object,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """See `reference.forward`, for rows whose chunks have one `offset`. Here rows and heads are one dimension R.

    Args:
        query, key, value: `[R, T, d]`; theta, eta, alpha `[R, T]`; mask `[R, T]` or None.
        weights, momentum, anchor: L tensors `[R, in, out]` each.
        begun: `anchor` is right for the first chunk even if `offset` says that it starts here.
    """
    outs, start = [], offset
    sizes = _sizes(offset, chunk, query.shape[1])
    # Split once, not sliced in the loop: the backward of a slice is as large as the whole sequence.
    parts = zip(*(t.split(sizes, 1) for t in (query, key, value)), strict=True)
    shown = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    every = _coefficients(theta, eta, alpha, mask, sizes)
    for (q, k, v), c, rows in zip(parts, every, shown, strict=True):
        if start % chunk == 0 and not (begun and start == offset):
            anchor = _renewed(anchor, weights, rows)
        inputs, deltas = inner_gradient(k, v, anchor, **loss)
        outs.append(_read(q, c.before() if before else c, weights, momentum, inputs, deltas))
        weights, momentum = _behind(c, weights, momentum, inputs, deltas)
        start += q.shape[1]
    return torch.cat(outs, 1) if outs else torch.zeros_like(query), weights, momentum, anchor


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
    before: bool,
    **loss: object,
) -> tuple[Tensor, Weights, Weights]:
    """One token of every row, `[R, 1, d]`; returns its output and the new W and S."""
    inputs, deltas = inner_gradient(key, value, anchor, **loss)
    theta, eta, keep = (g[:, :, None] for g in (theta, eta, 1 - alpha))
    momentum = [
        torch.baddbmm(eta * s, a.mT, d * theta, alpha=-1) for s, a, d in zip(momentum, inputs, deltas, strict=True)
    ]
    old, weights = weights, [torch.addcmul(s, keep, w) for s, w in zip(momentum, weights, strict=True)]
    return read(query, old if before else weights), weights, momentum


def _sizes(offset: int, chunk: int, length: int) -> list[int]:
    """The rest of a chunk that was begun, whole chunks, and the beginning of another."""
    head = min(-offset % chunk, length)
    whole, rest = divmod(length - head, chunk)
    return [size for size in (head, *[chunk] * whole, rest) if size]


def _coefficients(
    theta: Tensor, eta: Tensor, alpha: Tensor, mask: Tensor | None, sizes: list[int]
) -> list[Coefficients]:
    """Of every piece; neighbours of one size in one call."""
    found, start = [], 0
    for size, group in itertools.groupby(sizes):
        count = len(list(group))
        stop = start + count * size
        gates = (None if g is None else g[:, start:stop].unflatten(1, (count, size)) for g in (theta, eta, alpha, mask))
        pieces = (_normal(c).unbind(1) for c in coefficients(*gates))
        found += [Coefficients(*piece) for piece in zip(*pieces, strict=True)]
        start = stop
    return found


def _renewed(anchor: Weights, weights: Weights, mask: Tensor | None) -> Weights:
    """The anchor of a new chunk; rows without a token in it keep theirs, their chunk may not be over."""
    if mask is None:
        return weights
    rows = mask.any(1)[:, None, None]
    return [torch.where(rows, w, a) for w, a in zip(weights, anchor, strict=True)]


def _read(x: Tensor, c: Coefficients, weights: Weights, momentum: Weights, inputs: Weights, deltas: Weights) -> Tensor:
    """M_{W_t}(x_t) for every token of a chunk."""
    last = len(weights) - 1
    for layer, (w, s, a, d) in enumerate(zip(weights, momentum, inputs, deltas, strict=True)):
        near = _normal(torch.bmm(x, a.mT) * c.G)
        x = torch.baddbmm(torch.baddbmm(torch.bmm(c.beta[..., None] * x, w), c.f[..., None] * x, s), near, d, alpha=-1)
        x = x if layer == last else _normal(gelu(x))
    return x


def _behind(
    c: Coefficients, weights: Weights, momentum: Weights, inputs: Weights, deltas: Weights
) -> tuple[Weights, Weights]:
    """W and S behind the last token of a chunk."""
    beta, f, m = (t[:, -1, None, None] for t in (c.beta, c.f, c.m))
    in_weights, in_momentum = c.G[:, -1, :, None], c.N[:, -1, :, None]
    new_weights, new_momentum = [], []
    for w, s, a, d in zip(weights, momentum, inputs, deltas, strict=True):
        transposed = a.mT
        new_weights.append(torch.baddbmm(torch.addcmul(f * s, beta, w), transposed, d * in_weights, alpha=-1))
        new_momentum.append(torch.baddbmm(m * s, transposed, d * in_momentum, alpha=-1))
    return [_normal(w) for w in new_weights], [_normal(s) for s in new_momentum]


class _Normal(torch.autograd.Function):
    """Entries below 64 roots of the smallest normal number (7e-18 in fp32) as 0; the gradient of the identity.

    Products of gates, and a memory that forgets for long, end in subnormal numbers, which are many times slower. With
    this bound products of two entries stay normal, with room for a third factor near 1. The gradient passes where an
    entry is 0: gates and states of exactly 0 have one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return hardshrink(tensor, 64 * torch.finfo(tensor.dtype).tiny ** 0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


_normal = _Normal.apply
