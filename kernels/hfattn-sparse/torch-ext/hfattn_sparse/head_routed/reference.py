"""Head-routed attention, the specification: all heads, then zeros (MoH, arXiv 2410.11842, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import causal_mask, masked_attention


def forward(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out[h, i] = sum_j p_ij v_j where `heads[h, i]`, 0 elsewhere.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        heads: bool `[B, Hq, Nq]`, which (head, token) pairs are computed.
        causal: query row r sees keys up to `r + Nk - Nq`.

    Returns out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]` (-inf where nothing is computed). Differentiable in query, key
    and value.
    """
    allowed = heads[..., None]
    if causal:
        allowed = allowed & causal_mask(query.shape[2], key.shape[2], query.device)
    else:
        allowed = allowed.expand(*heads.shape, key.shape[2])
    return masked_attention(query, key, value, allowed, scale=scale)


def count_pairs(heads: Tensor, k_len: int, causal: bool) -> tuple[Tensor, Tensor]:
    """(query, key) pairs of the chosen heads and of all heads, 0-dim float64."""
    batch, count, q_len = heads.shape
    rows = torch.full((q_len,), k_len, dtype=torch.float64, device=heads.device)
    if causal:
        rows = torch.arange(k_len - q_len + 1, k_len + 1, dtype=torch.float64, device=heads.device).clamp(min=0)
    return (heads.sum((0, 1)) * rows).sum(), rows.sum() * batch * count
