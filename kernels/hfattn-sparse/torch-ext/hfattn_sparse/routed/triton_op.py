"""Routed block attention and its routing on Triton as custom ops, with the arguments of those in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count


@torch.library.custom_op(add_op_namespace_prefix("select_routes_triton"), mutates_args=())
def select_routes(
    query: Tensor, key: Tensor, index: Tensor | None, block_size: int, top_k: int, causal: bool
) -> Tensor:
    """As `op.select_routes`. fp32 scores in any case; head dimensions that are multiples of 8 from 8 to 256."""
    from . import triton_path

    count("select_routes", "triton")
    return triton_path.select_routes(query, key, index, block_size, top_k, causal)


@select_routes.register_fake
def _(query, key, index, block_size, top_k, causal):
    width = torch.sym_min(top_k, (key.shape[2] + block_size - 1) // block_size)
    return query.new_empty(*query.shape[:3], width, dtype=torch.int32)


@torch.library.custom_op(add_op_namespace_prefix("routed_block_attention_triton"), mutates_args=())
def routed_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    index: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool,
) -> tuple[Tensor, Tensor]:
    """As `op.routed_block_attention`; `allow_dense` has no effect, all of it is computed sparsely."""
    from . import triton_path

    count("routed_block_attention", "triton")
    return triton_path.forward(query, key, value, routes, index, block_size, causal, scale)


@routed_block_attention.register_fake
def _(query, key, value, routes, index, block_size, causal, scale, allow_dense):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("routed_block_attention_backward_triton"), mutates_args=())
def routed_block_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from . import triton_path

    count("routed_block_attention_backward", "triton")
    return triton_path.backward(
        grad_out, grad_lse, query, key, value, routes, index, out, lse, block_size, causal, scale
    )


@routed_block_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, routes, index, out, lse, block_size, causal, scale, allow_dense):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, routes, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, routes, index, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, routes, index, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = routed_block_attention_backward(
        grad_out, grad_lse, query, key, value, routes, index, out, lse, *ctx.options
    )
    return *grads, None, None, None, None, None, None


routed_block_attention.register_autograd(_backward, setup_context=_save_for_backward)
