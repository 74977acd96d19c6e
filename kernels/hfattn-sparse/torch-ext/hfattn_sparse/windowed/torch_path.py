"""Attention to sinks and a window in plain torch: PyTorch's fused attention over runs of query rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Query rows of one fused call: each call reads `window + ROWS` keys, so more rows waste more.
MIN_ROWS, MAX_ROWS = 64, 512


def forward(query: Tensor, key: Tensor, value: Tensor, *, sinks: int, window: int, scale: float) -> Tensor:
    """Query row r stands at position i = r + Nk - Nq and sees keys j <= i with j < sinks or j > i - window.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, H, Nk, D]`, `[B, H, Nk, Dv]`.
        sinks, window: tokens, >= 0 and >= 1.

    Returns `[B, Hq, Nq, Dv]`; rows before the first key give 0. Differentiable by autograd.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    offset = k_len - q_len
    first = max(-offset, 0)
    # Up to here no window has passed the sinks yet: plain causal rows.
    whole = min(max(sinks + window - offset, first), q_len)
    if offset > 0 and whole > 0:
        whole = 0  # behind a cache even those need a mask
    rows = min(max(window // 8, MIN_ROWS), MAX_ROWS)
    parts = []
    if first:
        parts.append(value.new_zeros(*query.shape[:2], first, value.shape[3]))
    if whole > first:
        end = whole + offset
        tensors = (query[:, :, first:whole], key[:, :, :end], value[:, :, :end])
        parts.append(_fused(*tensors, scale, is_causal=True))
    for start in range(max(whole, first), q_len, rows):
        stop = min(start + rows, q_len)
        parts.append(_run(query[:, :, start:stop], key, value, start + offset, sinks, window, scale))
    return torch.cat(parts, 2) if parts else query.new_zeros(*query.shape[:3], value.shape[3])


def _run(query: Tensor, key: Tensor, value: Tensor, position: int, sinks: int, window: int, scale: float) -> Tensor:
    """Rows at `position`, `position + 1`, ...: sinks, then one stretch of keys."""
    end = position + query.shape[2]
    low = max(position - window + 1, 0)
    if low <= sinks:
        key, value, sinks_read, low = key[:, :, :end], value[:, :, :end], 0, 0
    else:
        sinks_read = sinks
        key, value = (torch.cat([x[:, :, :sinks], x[:, :, low:end]], 2) for x in (key, value))
    rows = torch.arange(position, end, device=query.device)[:, None]
    keys = torch.arange(low, end, device=query.device)
    allowed = (keys <= rows) & ((keys > rows - window) | (keys < sinks))
    if sinks_read:
        allowed = torch.cat([allowed.new_ones(len(rows), sinks_read), allowed], 1)
    return _fused(query, key, value, scale, attn_mask=allowed)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, **mask) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=gqa, **mask)
