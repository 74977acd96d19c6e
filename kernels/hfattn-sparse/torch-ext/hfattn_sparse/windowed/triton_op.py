"""Attention to sinks and a window on Triton as a custom op; its gradients are those of the torch path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .op import sink_window_attention_backward


@torch.library.custom_op(add_op_namespace_prefix("sink_window_attention_triton"), mutates_args=())
def sink_window_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, sinks: int, window: int, scale: float
) -> Tensor:
    """As `op.sink_window_attention`."""
    from . import triton_path

    count("sink_window_attention", "triton")
    return triton_path.forward(query, key, value, index, sinks, window, scale)


@sink_window_attention.register_fake
def _(query, key, value, index, sinks, window, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


def _save_for_backward(ctx, inputs, output):
    query, key, value, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, index)


def _backward(ctx, grad_out):
    grads = sink_window_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


sink_window_attention.register_autograd(_backward, setup_context=_save_for_backward)
