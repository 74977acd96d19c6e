"""The selective scan, one token after the other: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t;  y_t = <h_t, C_t>, for every channel.

    Args:
        u, delta: `[B, G, L, E]`.
        A: `[G, E, n]`.
        B, C: `[B, G, L, n]`, shared by the channels of a group.
        state: `[B, G, E, n]`, h before the first token; None is zero.

    Returns y `[B, G, L, E]` in u's dtype and h behind the last token, fp32 (fp64 in fp64).
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, steps, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    x = x * steps
    state = x.new_zeros(u.shape[0], *A.shape) if state is None else state.to(dtype)
    outputs = []
    for t in range(u.shape[2]):
        decay = (steps[:, :, t, :, None] * A).exp()
        state = decay * state + x[:, :, t, :, None] * B[:, :, t, None, :]
        outputs.append((state * C[:, :, t, None, :]).sum(-1))
    y = torch.stack(outputs, 2) if outputs else torch.zeros_like(x)
    return y.to(u.dtype), state
