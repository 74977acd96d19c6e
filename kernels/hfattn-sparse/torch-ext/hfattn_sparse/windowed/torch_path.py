"""Attention to sinks and a window in plain torch: PyTorch's fused attention over runs of query rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Query rows of one fused call: each call reads `window + ROWS` keys, so more rows waste more.
MIN_ROWS, MAX_ROWS = 64, 512
# Scores that the backward holds at a time.
MAX_SCORES = 1 << 22


def forward(query: Tensor, key: Tensor, value: Tensor, *, sinks: int, window: int, scale: float) -> Tensor:
    """Query row r stands at position i = r + Nk - Nq and sees keys j <= i with j < sinks or j > i - window.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, H, Nk, D]`, `[B, H, Nk, Dv]`.
        sinks, window: tokens, >= 0 and >= 1.

    Returns `[B, Hq, Nq, Dv]`; rows before the first key give 0.
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


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *, sinks: int, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for `forward` with the same arguments; weights are computed again."""
    q_len, k_len = query.shape[2], key.shape[2]
    offset, heads = k_len - q_len, key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    widest = min(sinks + window + MIN_ROWS, k_len)
    # Half a window of rows reads half as many keys in vain again; smaller pieces stay in the cache of a core.
    most = min(max(window // 2, MIN_ROWS), MAX_ROWS)
    rows = min(max(MAX_SCORES // max(query.shape[0] * query.shape[1] * widest, 1), 16), most)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    for start in range(max(-offset, 0), q_len, rows):
        stop = min(start + rows, q_len)
        spans, allowed = _keys(start + offset, stop + offset, sinks, window, query.device)
        folded = [x[:, :, start:stop].to(dtype).unflatten(1, (heads, -1)) for x in (query, grad_out)]
        keys, values = (torch.cat([x[:, :, a:b] for a, b in spans], 2).to(dtype)[:, :, None] for x in (key, value))
        weights = (folded[0] @ keys.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1)
        grad_weights = folded[1] @ values.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_query[:, :, start:stop] = (grad_scores @ keys).flatten(1, 2).to(query.dtype)
        parts = (grad_key, (grad_scores.mT @ folded[0]).sum(2)), (grad_value, (weights.mT @ folded[1]).sum(2))
        for into, part in parts:
            first = 0
            for a, b in spans:
                into[:, :, a:b] += part[:, :, first : first + b - a]
                first += b - a
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _keys(
    position: int, end: int, sinks: int, window: int, device: torch.device
) -> tuple[list[tuple[int, int]], Tensor]:
    """Key ranges that rows `position` to `end` read, and which of those keys each row sees, bool `[rows, keys]`."""
    low = max(position - window + 1, 0)
    spans = [(0, end)] if low <= sinks else [(0, sinks), (low, end)] if sinks else [(low, end)]
    rows = torch.arange(position, end, device=device)[:, None]
    keys = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
    return spans, (keys <= rows) & ((keys > rows - window) | (keys < sinks))


def _run(query: Tensor, key: Tensor, value: Tensor, position: int, sinks: int, window: int, scale: float) -> Tensor:
    """Rows at `position`, `position + 1`, ...: sinks, then one stretch of keys."""
    spans, allowed = _keys(position, position + query.shape[2], sinks, window, query.device)
    key, value = (torch.cat([x[:, :, a:b] for a, b in spans], 2) for x in (key, value))
    return _fused(query, key, value, scale, attn_mask=allowed)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, **mask) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=gqa, **mask)
