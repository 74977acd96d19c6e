"""Dense attention of an AttentionCall: what layers that stay dense run, and the measure of every mechanism."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import AttentionCall
from hf_attn.ops.backend import autocast

# Elements of one mask, batch included; a longer call is computed in steps of query rows with a mask each.
MAX_MASK = 1 << 23


def dense_attention(call: AttentionCall) -> Tensor:
    """Exact attention `[B, Hq, Nq, Dv]` of the call by torch's SDPA, with the call's own mask.

    Without padding, packing, window or arbitrary mask no mask tensor is built; otherwise never more than `MAX_MASK`
    elements of one at a time (inside compiled graphs, and for gradients, all of it).
    """
    query, key, value = autocast(call.query, call.key, call.value)
    call = replace(call, query=query, key=key, value=value)
    rows = max(MAX_MASK // (query.shape[0] * call.k_len), 1)
    whole = rows >= call.q_len or call.k_len < call.q_len
    if whole or not _needs_mask(call) or torch.compiler.is_compiling():
        return _attend(call)
    steps = [(start, min(start + rows, call.q_len)) for start in range(0, call.q_len, rows)]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return torch.cat([_attend(_rows(call, *step)) for step in steps], 2)
    # Small results kept between large temporary masks would split the heap, and it would grow with every step.
    out = query.new_empty(*query.shape[:3], value.shape[3])
    for start, stop in steps:
        out[:, :, start:stop] = _attend(_rows(call, start, stop))
    return out


def _attend(call: AttentionCall) -> Tensor:
    mask, causal = _mask(call)
    gqa = call.query.shape[1] != call.key.shape[1]
    return scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=gqa
    )


def _rows(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    tokens = call.tokens.query_rows(start, stop, call.causal)
    key, value = call.key[:, :, : tokens.k_len], call.value[:, :, : tokens.k_len]
    return replace(call, query=call.query[:, :, start:stop], key=key, value=value, tokens=tokens)


def _needs_mask(call: AttentionCall) -> bool:
    """Whether SDPA's own causal flag (top-left aligned) cannot say it."""
    return not call.tokens.is_plain or (call.causal and call.q_len not in (1, call.k_len))


def _mask(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """The mask SDPA needs, or whether its causal flag says it."""
    if not _needs_mask(call):
        return None, call.causal and call.q_len > 1
    if call.tokens.dense is not None:
        return _as_mask(call.tokens.dense, call.query), False
    return call.tokens.visible(call.causal, call.query.device), False


def _as_mask(dense: Tensor, query: Tensor) -> Tensor:
    return dense if dense.dtype == torch.bool else dense.to(query.dtype)
