"""Attention of the vision backbones through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The written-out form; softmax in fp32. `[B, H, N, D]` -> `[B, N, H, D]` and the weights `[B, H, N, N]`."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype != torch.float64 else None).to(value.dtype)
    weights = drop(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Bidirectional attention by `module.config._attn_implementation`.

    Args:
        query, key, value: `[B, H, N, D]`, the same heads.
        bias: added to the scores, `[B | 1, H | 1, N, N]`.
        dropout: of the weights, in training.

    Returns `[B, H, N, Dv]`.
    """
    dropout = dropout if module.training else 0.0
    implementation = module.config._attn_implementation
    if implementation == "sdpa":
        return scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    out, _ = function(module, query, key, value, bias, scaling=scale, dropout=dropout, is_causal=False)
    return out.transpose(1, 2)
