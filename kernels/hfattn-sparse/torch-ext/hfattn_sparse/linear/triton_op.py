"""Linear attention on Triton as a custom op, with the arguments of that in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .op import save_for_backward


@torch.library.custom_op(add_op_namespace_prefix("linear_attention_triton"), mutates_args=())
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """As `op.linear_attention`; the kernel has block sizes of its own, `block` has no effect."""
    from . import triton_path

    count("linear_attention", "triton")
    return triton_path.forward(query, key, value, slopes, state, cu_seqlens, scale)


@linear_attention.register_fake
def _(query, key, value, slopes, state, cu_seqlens, scale, block):
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = query.new_empty(rows, query.shape[1], query.shape[3], value.shape[3], dtype=torch.float32)
    return query.new_empty(*query.shape[:3], value.shape[3]), final


@torch.library.custom_op(add_op_namespace_prefix("linear_attention_backward_triton"), mutates_args=())
def linear_attention_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the initial state."""
    from . import triton_path

    count("linear_attention_backward", "triton")
    return triton_path.backward(grad_out, grad_state, query, key, value, slopes, state, cu_seqlens, scale)


@linear_attention_backward.register_fake
def _(grad_out, grad_state, query, key, value, slopes, state, cu_seqlens, scale, block):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    return *grads, torch.empty_like(grad_state, memory_format=torch.contiguous_format)


def _backward(ctx, grad_out, grad_state):
    saved = ctx.saved_tensors  # once only: activation checkpointing forbids a second look
    grads = linear_attention_backward(grad_out, grad_state, *saved, *ctx.options)
    state = saved[4]
    grad_initial = None if state is None else grads[3].to(state.dtype)
    return *grads[:3], None, grad_initial, None, None, None


linear_attention.register_autograd(_backward, setup_context=save_for_backward)
