"""Dense masked attention: the specification both references are written in."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias, over allowed keys) v, with every intermediate in fp32 (fp64 for fp64 inputs).

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; Hq % Hkv == 0.
        allowed: bool, broadcastable to `[B, Hq, Nq, Nk]`.
        bias: added to the scores, broadcastable to `[B, Hq, Nq, Nk]`.

    Returns:
        out `[B, Hq, Nq, Dv]` in the query's dtype and lse `[B, Hq, Nq]` (natural log of the softmax denominator). A row
        that may see nothing gives 0 and -inf, and no gradient. Differentiable.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    wide_key = key.to(dtype).repeat_interleave(group, 1)
    wide_value = value.to(dtype).repeat_interleave(group, 1)
    scores = query.to(dtype) @ wide_key.mT * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe_total = torch.where(empty, 1, total)
    out = weights @ wide_value / safe_total
    lse = torch.where(empty, float("-inf"), top + safe_total.log()).squeeze(-1)
    return out.to(query.dtype), lse


def causal_mask(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """Bool `[q_len, k_len]`, bottom-right aligned: query row r is token `r + k_len - q_len`."""
    rows = torch.arange(k_len - q_len, k_len, device=device)
    return torch.arange(k_len, device=device) <= rows[:, None]
