"""Neighborhood attention by Triton kernels as a custom op, with the arguments and results of `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .op import neighborhood_attention_backward, windows_of


@torch.library.custom_op(add_op_namespace_prefix("neighborhood_attention_triton"), mutates_args=())
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    space: list[int],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As `op.neighborhood_attention`, but lse is always there, in fp32."""
    from . import triton_path

    count("neighborhood_attention", "triton")
    windows = windows_of(space, kernel, stride, dilation, causal)
    return triton_path.forward(query, key, value, rpb, key_mask, windows, scale)


@neighborhood_attention.register_fake
def _(query, key, value, rpb, key_mask, space, kernel, stride, dilation, causal, scale, want_lse):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("neighborhood_attention_triton_backward"), mutates_args=())
def neighborhood_attention_triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    space: list[int],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and rpb (empty without rpb)."""
    from . import triton_path

    count("neighborhood_attention_backward", "triton")
    windows = windows_of(space, kernel, stride, dilation, causal)
    tensors = (grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse)
    *grads, grad_rpb = triton_path.backward(*tensors, windows, scale)
    return *grads, query.new_empty(0) if grad_rpb is None else grad_rpb


@neighborhood_attention_triton_backward.register_fake
def _(grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse, space, kernel, stride, dilation, causal, scale):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    return *grads, query.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)


def torch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by the torch path, which finds the weights from the inputs alone."""
    return neighborhood_attention_backward(grad_out, grad_lse, query, key, value, rpb, key_mask, *options)


def _save_for_backward(ctx, inputs, output):
    *tensors, space, kernel, stride, dilation, causal, scale, _ = inputs
    ctx.options = space, kernel, stride, dilation, causal, scale
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, rpb, key_mask, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # Atomic adds come in any order.
    exact = torch.are_deterministic_algorithms_enabled()
    run = torch_backward if exact else neighborhood_attention_triton_backward
    *grads, grad_rpb = run(grad_out, grad_lse, query, key, value, rpb, key_mask, out, lse, *ctx.options)
    return *grads, None if rpb is None else grad_rpb, *[None] * 8


neighborhood_attention.register_autograd(_backward, setup_context=_save_for_backward)
