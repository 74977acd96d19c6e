"""Dense attention of an AttentionCall: what layers that stay dense run, and the measure of every mechanism."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import AttentionCall
from hf_attn.ops.backend import autocast


def dense_attention(call: AttentionCall) -> Tensor:
    """Exact attention `[B, Hq, Nq, Dv]` of the call by torch's SDPA, with the call's own mask.

    Without padding, packing, window or arbitrary mask no mask tensor is built.
    """
    query, key, value = autocast(call.query, call.key, call.value)
    mask, causal = _mask(call)
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=gqa
    )


def _mask(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """The mask SDPA needs, or whether its own causal flag (top-left aligned) says it."""
    tokens = call.tokens
    if tokens.dense is not None:
        return _as_mask(tokens.dense, call.query), False
    if not tokens.is_plain:
        return tokens.visible(call.causal, call.query.device), False
    if not call.causal or call.q_len == 1:
        return None, False
    if call.q_len == call.k_len:
        return None, True
    return tokens.visible(True, call.query.device), False


def _as_mask(dense: Tensor, query: Tensor) -> Tensor:
    return dense if dense.dtype == torch.bool else dense.to(query.dtype)
