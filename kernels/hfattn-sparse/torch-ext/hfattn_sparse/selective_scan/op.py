"""The selective scan as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from . import reference, torch_path


def run_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd."""
    count("selective_scan", "reference")
    return reference.forward(u, delta, A, B, C, state)


def run_torch(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y `[B, G, L, E]` and the final state `[B, G, E, n]`; arguments as `reference.forward`."""
    y, final, _ = selective_scan(u, delta, A, B, C, state)
    return y, final


@torch.library.custom_op(add_op_namespace_prefix("selective_scan"), mutates_args=())
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states between segments, which only the backward reads."""
    count("selective_scan", "torch")
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    return out, *torch_path.forward(u, delta, A, B, C, state, out)


@selective_scan.register_fake
def _(u, delta, A, B, C, state):
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    cut = torch_path._plan_of(u, A)
    starts = u.new_empty(cut.segments, cut.rows, cut.spans, A.shape[2], u.shape[3], dtype=dtype)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    return out, u.new_empty(u.shape[0], *A.shape, dtype=dtype), starts


@torch.library.custom_op(add_op_namespace_prefix("selective_scan_backward"), mutates_args=())
def selective_scan_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and the initial state."""
    count("selective_scan_backward", "torch")
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    grad_A, initial = torch_path.backward(grad_out, grad_state, u, delta, A, B, C, starts, grads)
    return grads[0], grads[1], grad_A.to(A.dtype), grads[2], grads[3], initial.contiguous()


@selective_scan_backward.register_fake
def _(grad_out, grad_state, u, delta, A, B, C, starts):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C)]
    return *grads, torch.empty_like(grad_state, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    *operands, state = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(*operands, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_out, grad_state, _):
    grads = selective_scan_backward(grad_out, grad_state, *ctx.saved_tensors)
    return *grads[:5], None if ctx.state_dtype is None else grads[5].to(ctx.state_dtype)


selective_scan.register_autograd(_backward, setup_context=_save_for_backward)
