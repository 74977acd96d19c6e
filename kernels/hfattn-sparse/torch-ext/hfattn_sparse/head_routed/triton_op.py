"""Head-routed attention on Triton as a custom op, with the arguments of that in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .op import save_for_backward


@torch.library.custom_op(add_op_namespace_prefix("head_routed_attention_triton"), mutates_args=())
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
    """As `op.head_routed_attention`; `allow_dense` has no effect, only chosen pairs are computed."""
    from . import triton_path

    count("head_routed_attention", "triton")
    return triton_path.forward(query, key, value, heads, index, causal, scale)


@head_routed_attention.register_fake
def _(query, key, value, heads, index, causal, scale, allow_dense):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("head_routed_attention_backward_triton"), mutates_args=())
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
    from . import triton_path

    count("head_routed_attention_backward", "triton")
    return triton_path.backward(grad_out, query, key, value, heads, index, out, lse, causal, scale)


@head_routed_attention_backward.register_fake
def _(grad_out, query, key, value, heads, index, out, lse, causal, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 8
    grads = head_routed_attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


head_routed_attention.register_autograd(_backward, setup_context=save_for_backward)
