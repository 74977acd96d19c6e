"""Attention to sinks and a window as a custom op: sequences are cut out here, one core call computes each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, split_sequences, take
from . import reference, torch_path


def run_reference(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, sinks: int, window: int, scale: float
) -> Tensor:
    """The reference under plain autograd; arguments as `sink_window_attention`."""
    count("sink_window_attention", "reference")
    return _over_sequences(reference.forward, query, key, value, index, sinks, window, scale)


@torch.library.custom_op(add_op_namespace_prefix("sink_window_attention"), mutates_args=(), tags=HOST_SYNC)
def sink_window_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, sinks: int, window: int, scale: float
) -> Tensor:
    """`[B, Hq, Nq, Dv]`; index is a token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None."""
    count("sink_window_attention", "torch")
    return _over_sequences(torch_path.forward, query, key, value, index, sinks, window, scale)


@sink_window_attention.register_fake
def _(query, key, value, index, sinks, window, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op(add_op_namespace_prefix("sink_window_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def sink_window_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    sinks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    count("sink_window_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    options = {"sinks": sinks, "window": window, "scale": scale}
    for s in split_sequences(index, query.shape[2], key.shape[2], True):
        picked = [take(x, s.batch, rows) for x, rows in ((grad_out, s.q), (query, s.q), (key, s.k), (value, s.k))]
        for grad, part, rows in zip(grads, torch_path.backward(*picked, **options), (s.q, s.k, s.k), strict=True):
            grad[s.batch, :, rows] = part
    return tuple(grads)


@sink_window_attention_backward.register_fake
def _(grad_out, query, key, value, index, sinks, window, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, index)


def _backward(ctx, grad_out):
    grads = sink_window_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


sink_window_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _over_sequences(core, query, key, value, index, sinks, window, scale) -> Tensor:
    options = {"sinks": sinks, "window": window, "scale": scale}
    if index is None:
        return core(query, key, value, **options)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for s in split_sequences(index, query.shape[2], key.shape[2], True):
        picked = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        out[s.batch, :, s.q] = core(*picked, **options)
    return out
