"""Attention to sinks and a window under one dense mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import masked_attention


def forward(query: Tensor, key: Tensor, value: Tensor, *, sinks: int, window: int, scale: float) -> Tensor:
    """The query at position i sees keys j <= i with j < sinks or j > i - window; arguments as the torch path."""
    q_len, k_len = query.shape[2], key.shape[2]
    position = torch.arange(k_len - q_len, k_len, device=query.device)[:, None]
    other = torch.arange(k_len, device=query.device)
    allowed = (other <= position) & ((other < sinks) | (other > position - window))
    return masked_attention(query, key, value, allowed, scale=scale)[0]
