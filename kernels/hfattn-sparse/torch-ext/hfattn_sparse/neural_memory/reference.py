"""Neural memory one token after the other: the specification (Titans, arXiv 2501.00663, eq. 8 to 18)."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import inner_gradient, read


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    offset: Tensor,
    chunk: int,
    mask: Tensor | None,
    before: bool,
    **loss: object,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """For every token t, with W_c the weights at the start of its chunk and u_t = grad l(W_c; k_t, v_t):

        S_t = eta_t S_{t-1} - theta_t u_t
        W_t = (1 - alpha_t) W_{t-1} + S_t
        y_t = M_{W_t}(q_t), or M_{W_{t-1}}(q_t) with `before`

    Args:
        query, key, value: `[B, H, T, d]`, and theta, eta, alpha `[B, H, T]`, in the dtype of the computation.
        weights, momentum, anchor: W, S and W_c before the first token, L tensors `[B, H, in, out]` each.
        offset: int64 `[B]`, tokens of each row's current chunk that lie behind; a multiple of `chunk` starts a new one.
        mask: bool `[B, T]`; other tokens change nothing, count for no chunk, and their output is 0.
        loss: options of `inner_gradient`.

    Returns y `[B, H, T, d]` and W, S, W_c behind the last token. Any dtype, differentiable to any order.
    """
    outs, offset = [], offset.clone()
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t : t + 1] for x in (query, key, value))
        step, keep_momentum, forget = (g[:, :, t, None, None] for g in (theta, eta, alpha))
        shown = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask[:, t]
        starts = (shown & (offset % chunk == 0))[:, None, None, None]
        anchor = [torch.where(starts, w, a) for w, a in zip(weights, anchor, strict=True)]
        inputs, deltas = inner_gradient(k, v, anchor, **loss)
        old, rows = weights, shown[:, None, None, None]
        new = [keep_momentum * s - step * (a.mT @ d) for s, a, d in zip(momentum, inputs, deltas, strict=True)]
        weights = [torch.where(rows, (1 - forget) * w + s, w) for w, s in zip(weights, new, strict=True)]
        momentum = [torch.where(rows, s, last) for s, last in zip(new, momentum, strict=True)]
        outs.append(torch.where(rows, read(q, old if before else weights), 0))
        offset = offset + shown
    return torch.cat(outs, 2) if outs else torch.zeros_like(query), weights, momentum, anchor
