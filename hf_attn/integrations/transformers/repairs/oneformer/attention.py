"""Attention of OneFormer through transformers' attention interface: same weights and arithmetic, any implementation."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import dropout, linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.oneformer import modeling_oneformer as host


class Routed:
    """What a mended attention module has besides the host's: the model's config, which names the implementation."""

    config: Any
    is_causal = False


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor | None = None,
    *,
    dropout_rate: float = 0.0,
    is_causal: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[B, h, N, d]` tensors by the implementation that `module.config` names.

    Args:
        blocked: bool `[B | 1, 1 | h, Nq, Nk]`, True where a query may not look, or an additive mask of that shape.
        need_weights: return the weights too; only eager has them, so another implementation is left for this call.

    Returns `[B, Nq, h, d]` and the weights `[B, h, Nq, Nk]` or None. Raises what the implementation raises.
    """
    name = module.config._attn_implementation or "eager"
    if is_causal and blocked is not None:
        future = _causal(query, key)
        blocked = blocked | future if blocked.dtype == torch.bool else blocked.masked_fill(future, float("-inf"))
        is_causal = False
    rate = dropout_rate if module.training else 0.0
    scale = query.shape[-1] ** -0.5
    if need_weights and name != "eager":
        _warn_weights(name)
        name = "eager"
    if name == "eager":
        return eager(query, key, value, _causal(query, key) if is_causal else blocked, scale, rate)
    mask = _causal(query, key) if is_causal and name != "sdpa" else blocked
    if mask is not None:
        mask = _block_mask(mask, query, key) if name == "flex_attention" else _allowed(mask)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    out, _ = function(
        module, query, key, value, mask, dropout=rate, scaling=scale, is_causal=is_causal and mask is None
    )
    return out, None


def eager(
    query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None, scale: float, rate: float
) -> tuple[Tensor, Tensor]:
    """The host's arithmetic, step for step: scaled queries, scores, softmax in the model's dtype, dropout."""
    scores = (query * scale) @ key.mT
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf")) if blocked.dtype == torch.bool else scores + blocked
    weights = scores.softmax(-1)
    return (dropout(weights, rate, rate > 0) @ value).transpose(1, 2), weights


class RoutedAttention(Routed, host.OneFormerAttention):
    """Self-attention of the masked decoder."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[N, B, width]` -> the same, and weights `[B, h, Nq, Nk]` if asked for."""
        source = hidden_states if key_value_states is None else key_value_states
        place = position_embeddings if key_value_states is None else key_value_position_embeddings
        states = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        # Batch first before the projections, as the host does: the rounding of a product depends on its layout.
        states, source = states.transpose(0, 1), source.transpose(0, 1)
        keys = source if place is None else source + place.transpose(0, 1)
        query = self._heads(self.q_proj(states))
        key, value = self._heads(self.k_proj(keys)), self._heads(self.v_proj(source))
        mask = attention_mask
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        out, weights = attend(self, query, key, value, mask, dropout_rate=self.dropout, need_weights=output_attentions)
        out = self.out_proj(out.reshape(*states.shape[:2], -1)).transpose(0, 1)
        return out, weights if output_attentions else None

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2).contiguous()


class RoutedMultiheadAttention(Routed, nn.MultiheadAttention):
    """nn.MultiheadAttention whose scores go through the attention interface; weights are formed only on request."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[N, B, width]` tensors -> output `[Nq, B, width]` and, if asked for, weights `[B, Nq, Nk]` or by head.

        attn_mask: bool, True where a query may not look, or additive: `[Nq, Nk]`, `[B * h, Nq, Nk]` or, not repeated
        for the heads, `[B, 1, Nq, Nk]`. key_padding_mask: bool `[B, Nk]`, True for keys that nobody sees.
        """
        length, batch = query.shape[:2]
        sides = (query, key, value)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        states = [linear(x, w, b) for x, w, b in zip(sides, self.in_proj_weight.chunk(3), biases, strict=True)]
        heads = [x.reshape(x.shape[0], batch * self.num_heads, -1).transpose(0, 1) for x in states]
        query, key, value = (x.unflatten(0, (batch, self.num_heads)) for x in heads)
        blocked = self._blocked(attn_mask, key_padding_mask, batch)
        out, weights = attend(
            self, query, key, value, blocked, dropout_rate=self.dropout, is_causal=is_causal, need_weights=need_weights
        )
        out = self.out_proj(out.permute(1, 0, 2, 3).reshape(length, batch, -1))
        if not need_weights or weights is None:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights

    def _blocked(self, mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (batch, self.num_heads))
        elif mask is not None and mask.dim() == 2:
            mask = mask[None, None]
        if padding is None:
            return mask
        padding = padding[:, None, None, :]
        if mask is None or mask.dtype == torch.bool:
            return padding if mask is None else mask | padding
        return mask.masked_fill(padding, float("-inf"))


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """bool `[1, 1, Nq, Nk]`, True above the diagonal."""
    full = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return full.triu(1)[None, None]


def _block_mask(blocked: Tensor, query: Tensor, key: Tensor) -> BlockMask:
    """The mask for FlexAttention: a score function that reads a tensor corrupts memory on CPUs (torch 2.13)."""
    if blocked.dtype != torch.bool:
        raise ValueError(f"flex_attention takes bool masks here, got {blocked.dtype}; use 'sdpa' or 'eager'")
    blocked = blocked.expand(query.shape[0], -1, -1, -1)
    heads = blocked.shape[1]

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ~blocked[batch, head if heads > 1 else 0, row, column]

    sizes = (query.shape[2], key.shape[2])
    return create_block_mask(sees, len(query), heads if heads > 1 else None, *sizes, device=query.device)


def _allowed(mask: Tensor) -> Tensor:
    """The mask with the meaning of the attention interface: True where a query may look."""
    return ~mask if mask.dtype == torch.bool else mask


@cache
def _warn_weights(name: str) -> None:
    warnings.warn(
        f"output_attentions=True needs the weights, which {name!r} never forms; this call runs eager attention. "
        "Load with attn_implementation='eager' to silence this.",
        stacklevel=3,
    )
