"""Attention by a grouped softmax, dense: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import causal_mask


def forward(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query splits one softmax over its own block and earlier landmarks; earlier blocks split their share.

    Token j belongs to block beta(j), the number of landmarks strictly before it. Query i sees keys j <= i with scores
    s_ij = scale * q_i k_j.

        A_i   = regular tokens of block beta(i) and landmarks of earlier blocks that hold a regular token
        t_ij  = softmax over A_i of s_ij
        r_ij  = softmax over the regular tokens of block beta(j) of s_ij
        w_ij  = t_ij in the own block, r_ij * t_i,landmark(beta(j)) in earlier blocks, 0 for landmarks

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; queries are the last tokens.
        landmarks: bool `[1 | B, Nk]`.

    Returns `sum_j w_ij v_j`, `[B, Hq, Nq, Dv]` in the query's dtype, and the log of the denominator of t,
    `[B, Hq, Nq]`. Rows with an empty A_i give 0 and -inf, and no gradient. Every intermediate is fp32 (fp64 for fp64).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_len, k_len = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    wide_key = key.to(dtype).repeat_interleave(group, 1)
    # The value of a landmark is never read, whatever it holds.
    wide_value = value.to(dtype).masked_fill(landmarks[:, None, :, None], 0).repeat_interleave(group, 1)
    scores = query.to(dtype) @ wide_key.mT * scale

    block = landmarks.long().cumsum(1) - landmarks.long()
    place = torch.arange(k_len - q_len, k_len, device=query.device).clamp(min=0)
    own = block[:, place, None] == block[:, None, :]
    regular = ~landmarks[:, None, :]
    # [1 | B, Nk, Nk] -> does the block of a landmark hold a regular token?
    holds = ((block[:, :, None] == block[:, None, :]) & regular).any(-1)[:, None, :]
    causal = causal_mask(q_len, k_len, query.device)
    top_weights, lse = _softmax(scores, causal & ((own & regular) | (~own & ~regular & holds)))

    weights = torch.where((own & regular)[:, None], top_weights, 0)
    for number in range(int(block.max()) if block.numel() else 0):
        members = (block == number)[:, None, :] & regular & causal & ~own
        gate = (top_weights * ((block == number) & landmarks)[:, None, None, :]).sum(-1, keepdim=True)
        weights = weights + gate * _softmax(scores, members)[0]
    return (weights @ wide_value).to(query.dtype), lse


def _softmax(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over allowed keys, 0 in rows without one, and the log of the denominator."""
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    safe = torch.where(total == 0, 1, total)
    lse = torch.where(total == 0, float("-inf"), top + safe.log()).squeeze(-1)
    return weights / safe, lse
