"""Decayed linear attention with its whole decay matrix: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out_t = scale * q_t S_t with S_t = exp(-slope_t) S_{t-1} + k_t^T v_t, written as one product.

    Args:
        query, key, value: `[B, H, N, D]`, `[B, H, N, D]`, `[B, H, N, E]`.
        slopes: `[H]` or `[B, H, N]`, log-decays >= 0.
        state: `[B, H, D, E]`, S before the first token; None is zero.

    Returns out `[B, H, N, E]` in the query's dtype and the state behind the last token, fp32 (fp64 in fp64).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype) for t in (query, key, value))
    batch, heads, length, dim = q.shape
    steps = slopes.to(dtype)[None, :, None] if slopes.dim() == 1 else slopes.to(dtype)
    decayed = steps.expand(batch, heads, length).cumsum(-1)
    distance = decayed[..., :, None] - decayed[..., None, :]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    decay = (-distance.masked_fill(future, float("inf"))).exp()
    state = q.new_zeros(batch, heads, dim, v.shape[-1]) if state is None else state.to(dtype)
    out = (q @ k.mT * decay) @ v + (-decayed).exp()[..., None] * (q @ state)
    last = decayed[..., -1:] if length else decayed.new_zeros(batch, heads, 1)
    weights = (decayed - last).exp()
    return (out * scale).to(query.dtype), (-last).exp()[..., None] * state + (weights[..., None] * k).mT @ v
