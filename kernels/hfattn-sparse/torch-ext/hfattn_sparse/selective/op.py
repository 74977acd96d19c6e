"""Selective attention as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import reference, torch_path


def run_reference(query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float) -> Tensor:
    """The reference under plain autograd."""
    count("selective_attention", "reference")
    return reference.forward(query, key, value, selected, causal, scale)


@torch.library.custom_op(add_op_namespace_prefix("selective_attention"), mutates_args=(), tags=HOST_SYNC)
def selective_attention(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float
) -> Tensor:
    """`[B, Hq, N, Dv]`; selected bool `[B, Hkv, N]`."""
    count("selective_attention", "torch")
    return torch_path.forward(query, key, value, selected, causal, scale)


@selective_attention.register_fake
def _(query, key, value, selected, causal, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op(add_op_namespace_prefix("selective_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def selective_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    count("selective_attention_backward", "torch")
    return torch_path.backward(grad_out, query, key, value, selected, causal, scale)


@selective_attention_backward.register_fake
def _(grad_out, query, key, value, selected, causal, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, selected, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, selected)


def _backward(ctx, grad_out):
    return *selective_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None


selective_attention.register_autograd(_backward, setup_context=_save_for_backward)
