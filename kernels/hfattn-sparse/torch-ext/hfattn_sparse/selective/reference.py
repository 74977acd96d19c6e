"""Selective attention under a dense mask: the specification."""

from __future__ import annotations

from torch import Tensor

from ..masked import causal_mask, masked_attention


def forward(query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float) -> Tensor:
    """Arguments as in `torch_path.forward`."""
    group = query.shape[1] // key.shape[1]
    allowed = (selected[:, :, :, None] & selected[:, :, None, :]).repeat_interleave(group, 1)
    if causal:
        allowed = allowed & causal_mask(query.shape[2], key.shape[2], query.device)
    return masked_attention(query, key, value, allowed, scale=scale)[0]
