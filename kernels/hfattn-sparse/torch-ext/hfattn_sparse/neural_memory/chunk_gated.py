"""The memory of titans-pytorch: gates a chunk instead of a token, reads a chunk late, anchors many chunks old.

A different function from Titans (arXiv 2501.00663), kept for weights that were trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from .network import read

_EPS = 1e-5  # of the norm inside the memory network


class ChunkWeights(NamedTuple):
    """Weights before the first chunk and behind each, `[B, H, 1 + chunks, ...]`, and the momentum behind the last.

    The first L entries are the matrices; with a residual norm one more, its scale gamma `[..., d]`, follows.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]


def recall(query: Tensor, weights: Sequence[Tensor], residual_norm: bool) -> Tensor:
    """M(x) = MLP(x), or x + LayerNorm(MLP(x)) * (1 + gamma), for `[..., T, d]`."""
    if not residual_norm:
        return read(query, weights)
    *matrices, gamma = weights
    normed = layer_norm(read(query, matrices), query.shape[-1:], eps=_EPS)
    return query + normed * (1 + gamma[..., None, :])


def gradient(
    key: Tensor, value: Tensor, theta: Tensor, weights: Sequence[Tensor], residual_norm: bool, mean_loss: bool
) -> list[Tensor]:
    """Gradient of sum_t theta_t * ||M(k_t) - v_t||^2 (or its mean over features) in every weight.

    Args:
        key, value: `[..., m, d]`; theta `[..., m]`; weights `[..., in, out]` and, last, gamma `[..., d]`.
    """
    matrices = list(weights[:-1] if residual_norm else weights)
    inputs, before = [key], []
    for matrix in matrices[:-1]:
        before.append(inputs[-1] @ matrix)
        inputs.append(gelu(before[-1]))
    out, extra = inputs[-1] @ matrices[-1], []
    scale = (2 / out.shape[-1] if mean_loss else 2) * theta[..., None]
    if residual_norm:
        centred = out - out.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + _EPS)
        normed, shown = centred * inverse, 1 + weights[-1][..., None, :]
        error = scale * (key + normed * shown - value)
        extra = [(error * normed).sum(-2)]
        flow = error * shown
        delta = inverse * (flow - flow.mean(-1, keepdim=True) - normed * (flow * normed).mean(-1, keepdim=True))
    else:
        delta = scale * (out - value)
    grads = []
    for layer in range(len(matrices) - 1, -1, -1):
        grads.append(inputs[layer].mT @ delta)
        if layer:
            delta = torch.ops.aten.gelu_backward(delta @ matrices[layer].mT, before[layer - 1])
    return [*reversed(grads), *extra]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    *,
    chunk: int,
    anchor: int | None,
    residual_norm: bool,
    mean_loss: bool,
) -> tuple[Tensor, ChunkWeights]:
    """For chunk i of the complete ones, with W_a the weights at the last multiple of `anchor` tokens before it:

        g_i = gradient at W_a;  S_i = eta_i S_{i-1} - g_i;  W_i = (1 - alpha_i) W_{i-1} + S_i

    and token t (from 0) is read with the weights behind floor((t + 1) / chunk) chunks.

    Args:
        query, key, value: `[B, H, T, d]`; theta `[B, H, T]`; eta, alpha `[B, H, floor(T / chunk)]`.
        weights: `[B, H, in, out]` each and, with `residual_norm`, gamma `[B, H, d]`.
        anchor: tokens between anchors, a multiple of `chunk`; None is the weights before the first chunk throughout.
    """
    length, current = query.shape[2], list(weights)
    momentum, base, seen = [torch.zeros_like(w) for w in current], current, [current]
    for number in range(length // chunk):
        start = number * chunk
        if anchor is not None and start % anchor == 0:
            base = current
        part = (t[:, :, start : start + chunk] for t in (key, value, theta))
        grads = gradient(*part, base, residual_norm, mean_loss)
        keep, forget = eta[:, :, number], 1 - alpha[:, :, number]
        momentum = [_by_head(keep, s) * s - g for s, g in zip(momentum, grads, strict=True)]
        current = [_by_head(forget, w) * w + s for w, s in zip(current, momentum, strict=True)]
        seen.append(current)
    outs, start = [], 0
    for number, known in enumerate(seen):
        stop = min((number + 1) * chunk - 1, length)
        outs.append(recall(query[:, :, start:stop], known, residual_norm))
        start = stop
    stacked = tuple(torch.stack(of_one, 2) for of_one in zip(*seen, strict=True))
    return torch.cat(outs, 2), ChunkWeights(stacked, tuple(momentum))


def _by_head(gate: Tensor, like: Tensor) -> Tensor:
    return gate.view(*gate.shape, *[1] * (like.dim() - 2))
