"""Multi-scale deformable attention as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from . import reference, torch_path


def run_reference(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The reference under plain autograd."""
    count("ms_deform_attn", "reference")
    return reference.forward(value, shapes, locations, weights)


@torch.library.custom_op(add_op_namespace_prefix("ms_deform_attn"), mutates_args=())
def ms_deform_attn(value: Tensor, heights: list[int], widths: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """`[B, Q, h * d]`; heights and widths of the levels, everything else as in the reference."""
    count("ms_deform_attn", "torch")
    return torch_path.forward(value, list(zip(heights, widths, strict=True)), locations, weights)


@ms_deform_attn.register_fake
def _(value, heights, widths, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op(add_op_namespace_prefix("ms_deform_attn_backward"), mutates_args=())
def ms_deform_attn_backward(
    grad_out: Tensor, value: Tensor, heights: list[int], widths: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    count("ms_deform_attn_backward", "torch")
    return torch_path.backward(grad_out, value, list(zip(heights, widths, strict=True)), locations, weights)


@ms_deform_attn_backward.register_fake
def _(grad_out, value, heights, widths, locations, weights):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, locations, weights))


def _save_for_backward(ctx, inputs, output):
    value, ctx.heights, ctx.widths, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_out):
    value, locations, weights = ctx.saved_tensors
    grads = ms_deform_attn_backward(grad_out, value, ctx.heights, ctx.widths, locations, weights)
    return grads[0], None, None, grads[1], grads[2]


ms_deform_attn.register_autograd(_backward, setup_context=_save_for_backward)
