"""Head-routed attention as a custom op: sequences are cut out here, one core call computes each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, split_sequences, take
from . import native_path, reference, torch_path


def run_reference(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, index: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The reference under plain autograd; arguments as `head_routed_attention`."""
    count("head_routed_attention", "reference")
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for s in split_sequences(index, query.shape[2], key.shape[2], causal):
        picked = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        out[s.batch, :, s.q], _ = reference.forward(*picked, take(heads, s.batch, s.q), causal=causal, scale=scale)
    return out


@torch.library.custom_op(add_op_namespace_prefix("head_routed_attention"), mutates_args=(), tags=HOST_SYNC)
def head_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    index: Tensor | None,
    causal: bool,
    scale: float,
    allow_dense: bool,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        heads: bool `[B, Hq, Nq]`.
        index: token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
        allow_dense: compute all heads of a sequence where that is faster.
    """
    if index is None:
        return _sequence(query, key, value, heads, causal, scale, allow_dense)
    out, lse = _empty(query, value)
    out.zero_()
    lse.fill_(float("-inf"))
    for s in split_sequences(index, query.shape[2], key.shape[2], causal):
        tensors = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        part = _sequence(*tensors, take(heads, s.batch, s.q), causal, scale, allow_dense)
        out[s.batch, :, s.q], lse[s.batch, :, s.q] = part
    return out, lse


def _sequence(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, causal: bool, scale: float, allow_dense: bool
) -> tuple[Tensor, Tensor]:
    native = torch_path.takes_native(query, key, value, scale)
    dense = allow_dense and torch_path.prefers_dense(heads, key, native)
    if native and not dense:
        count("head_routed_attention", "torch: native")
        return native_path.forward(query, key, value, heads, causal=causal, scale=scale)
    count("head_routed_attention", "torch: dense" if dense else "torch")
    return torch_path.forward(query, key, value, heads, causal=causal, scale=scale, dense=dense)


def _empty(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse; the heads of a token lie together in memory, as the projection after them wants it."""
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=wide)


@head_routed_attention.register_fake
def _(query, key, value, heads, index, causal, scale, allow_dense):
    return _empty(query, value)


@torch.library.custom_op(add_op_namespace_prefix("head_routed_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def head_routed_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    count("head_routed_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    for s in split_sequences(index, query.shape[2], key.shape[2], causal):
        asked = [take(x, s.batch, s.q) for x in (grad_out, query, heads, out, lse)]
        keys = [take(x, s.batch, s.k) for x in (key, value)]
        parts = torch_path.backward(asked[0], asked[1], *keys, *asked[2:], causal=causal, scale=scale)
        for grad, part, rows in zip(grads, parts, (s.q, s.k, s.k), strict=True):
            grad[s.batch, :, rows] = part
    return tuple(grads)


@head_routed_attention_backward.register_fake
def _(grad_out, query, key, value, heads, index, out, lse, causal, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def save_for_backward(ctx, inputs, output):
    """Context of both the torch and the Triton op."""
    query, key, value, heads, index, ctx.causal, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key, value, heads, index, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 8
    grads = head_routed_attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


head_routed_attention.register_autograd(_backward, setup_context=save_for_backward)
