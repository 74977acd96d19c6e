"""Attention of a prompt of documents as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import native_path, reference, torch_path


def run_reference(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """The reference under plain autograd; arguments as `document_attention`."""
    count("document_attention", "reference")
    return reference.forward(query, key, value, table, scale)


@torch.library.custom_op(add_op_namespace_prefix("document_attention"), mutates_args=(), tags=HOST_SYNC)
def document_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """`[B, Hq, N, Dv]`; table int32 `[B, 3, N]` as in the reference."""
    if torch_path.takes_native(query, key, value, scale):
        count("document_attention", "torch: native")
        return native_path.forward(query, key, value, table, scale)
    count("document_attention", "torch")
    return torch_path.forward(query, key, value, table, scale)


@document_attention.register_fake
def _(query, key, value, table, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op(add_op_namespace_prefix("document_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def document_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; weights are computed again."""
    count("document_attention_backward", "torch")
    return torch_path.backward(grad_out, query, key, value, table, scale)


@document_attention_backward.register_fake
def _(grad_out, query, key, value, table, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, table, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, table)


def _backward(ctx, grad_out):
    return *document_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


document_attention.register_autograd(_backward, setup_context=_save_for_backward)
