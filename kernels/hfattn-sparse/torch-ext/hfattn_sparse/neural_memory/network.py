"""The memory network and its inner gradient, written out: the outer loss differentiates through both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu


def read(query: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """M_W(x) = gelu(... gelu(x W^1) ...) W^L for `[..., T, d]` and weights `[..., in, out]`."""
    for weight in weights[:-1]:
        query = gelu(query @ weight)
    return query @ weights[-1]


def inner_gradient(
    key: Tensor,
    value: Tensor,
    weights: Sequence[Tensor],
    *,
    mean_loss: bool = False,
    max_norm: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Factors of the gradient of l(W; k, v) = ||M_W(k) - v||^2 in every layer: u^l_t = a^l_t (outer) delta^l_t.

    Args:
        key, value: `[..., T, d]`.
        weights: L matrices `[..., in, out]`, the same for all T tokens.
        mean_loss: the mean over features instead of their sum.
        max_norm: tokens whose gradient (over all layers) has a larger norm are scaled down to it.

    Returns the layer inputs a^l `[..., T, in]` and delta^l `[..., T, out]`.
    """
    inputs, before = [key], []
    for weight in weights[:-1]:
        before.append(inputs[-1] @ weight)
        inputs.append(gelu(before[-1]))
    error = inputs[-1] @ weights[-1] - value
    deltas = [error * (2 / error.shape[-1] if mean_loss else 2)]
    for weight, z in zip(reversed(weights[1:]), reversed(before), strict=True):
        deltas.append(torch.ops.aten.gelu_backward(deltas[-1] @ weight.mT, z))
    deltas.reverse()
    if max_norm is not None:
        squares = [a.square().sum(-1) * d.square().sum(-1) for a, d in zip(inputs, deltas, strict=True)]
        norm = torch.stack(squares).sum(0).clamp(min=torch.finfo(key.dtype).tiny).sqrt()
        scale = (max_norm / norm).clamp(max=1)[..., None]
        deltas = [delta * scale for delta in deltas]
    return inputs, deltas
