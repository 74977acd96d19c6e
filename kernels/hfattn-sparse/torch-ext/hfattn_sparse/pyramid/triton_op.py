"""Pyramid attention on Triton as a custom op; its gradients are those of the torch path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from .op import over_sequences, pyramid_attention_backward


@torch.library.custom_op(add_op_namespace_prefix("pyramid_attention_triton"), mutates_args=(), tags=HOST_SYNC)
def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """As `op.pyramid_attention`; only a token index is read on the host."""
    from . import triton_path

    count("pyramid_attention", "triton")
    options = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale, "tail": tail}
    return over_sequences(triton_path.forward, query, key, value, levels, index, options)


@pyramid_attention.register_fake
def _(query, key, value, levels, index, block_q, block_k, causal, scale, tail):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.block_q, ctx.block_k, ctx.causal, ctx.scale, ctx.tail = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, levels, index, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = (ctx.block_q, ctx.block_k, ctx.causal, ctx.scale, ctx.tail)
    grads = pyramid_attention_backward(grad_out, grad_lse, query, key, value, levels, index, out, lse, *options)
    return *grads, *[None] * 7


pyramid_attention.register_autograd(_backward, setup_context=_save_for_backward)
