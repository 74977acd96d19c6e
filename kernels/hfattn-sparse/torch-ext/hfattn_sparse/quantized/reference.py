"""Quantised block-sparse attention, the specification: codes times scales, and one dense softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_sparse.reference import token_mask
from .codes import SMALLEST, accumulator, qmax, quantize_channels, quantize_groups


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    key_mask: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    q_group: int,
    k_group: int,
    qk_bits: int | None,
    pv_bits: int | None,
    scale: float,
) -> Tensor:
    """out_i = sum_b (round(p_ib / sp_b) round(v_b / sv)) sp_b sv / sum_j p_ij with p_ij = exp(s_ij - max_j s_ij).

    s_ij = scale * sq sk (round(q_i / sq) . round(k_j / sk)). Sums run over the keys of the blocks that row i reads; the
    denominator takes the unquantised p; sp is the largest p of a block of rows and keys over qmax. Any dtype.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        indices: int `[B | 1, Hq | Hkv | 1, ceil(Nq / block_q), M]`, -1 padded.
        key_mask: bool `[B | 1, Nk]`, False hides a key, or None.
        q_group, k_group: rows that share a scale.
        qk_bits, pv_bits: 8, 4, or None for a product that is not quantised.

    Returns `[B, Hq, Nq, Dv]` in the query's dtype; rows without a key give 0.
    """
    dtype, group = accumulator(query.dtype), query.shape[1] // key.shape[1]
    allowed = token_mask(indices, query.shape[2], key.shape[2], block_q, block_k, query.shape[1])
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        allowed = allowed & key_mask[:, None, None]
    wide_q, wide_k = query.to(dtype), key.to(dtype)
    if qk_bits is not None:
        wide_q, wide_k = (_restored(x, qk_bits, g) for x, g in ((query, q_group), (key, k_group)))
    scores = wide_q @ wide_k.repeat_interleave(group, 1).mT * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:3], 1)
    weights = (scores - torch.where(top == float("-inf"), 0, top)).exp()
    total = weights.sum(-1, keepdim=True)
    wide_v = value.to(dtype)
    if pv_bits is not None:
        codes, sv = quantize_channels(value, pv_bits)
        wide_v = codes.to(dtype) * sv[:, :, None]
        weights = _rounded(weights, pv_bits, block_q, block_k)
    out = weights @ wide_v.repeat_interleave(group, 1) / torch.where(total == 0, 1, total)
    return out.to(query.dtype)


def _restored(x: Tensor, bits: int, group: int) -> Tensor:
    codes, scales = quantize_groups(x, bits, group)
    return codes.to(scales.dtype) * scales.repeat_interleave(group, 2)[:, :, : x.shape[2], None]


def _rounded(weights: Tensor, bits: int, block_q: int, block_k: int) -> Tensor:
    """P `[B, H, Nq, Nk]` rounded with one scale a block."""
    q_len, k_len = weights.shape[2:]
    padding = (0, -k_len % block_k, 0, -q_len % block_q)
    blocks = torch.nn.functional.pad(weights, padding).unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
    step = blocks.amax((3, 5), keepdim=True).clamp(min=SMALLEST) / qmax(bits)
    return ((blocks / step).round() * step).flatten(4, 5).flatten(2, 3)[:, :, :q_len, :k_len]
