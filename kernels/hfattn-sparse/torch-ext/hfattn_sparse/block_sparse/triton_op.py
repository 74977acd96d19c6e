"""Block-sparse attention by Triton kernels as a custom op, with the arguments and results of `op`."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..device_sequences import check_alignment


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention_triton"), mutates_args=())
def block_sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse fp32 `[B, Hq, Nq]`; see `triton_path.forward`. Never waits for the device, unless
    HF_ATTN_CHECK=1 asks for indices and index to be checked."""
    from . import triton_path

    count("block_sparse_attention", "triton")
    if os.environ.get("HF_ATTN_CHECK") == "1":
        check(query, key, indices, index, block_k, causal)
    return triton_path.forward(query, key, value, indices, index, key_bias, block_q, block_k, causal, scale)


@block_sparse_attention_triton.register_fake
def _(query, key, value, indices, index, key_bias, block_q, block_k, causal, scale):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention_triton_backward"), mutates_args=())
def block_sparse_attention_triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and key_bias (an empty tensor without key_bias)."""
    from . import triton_path

    count("block_sparse_attention_backward", "triton")
    dq, dk, dv, dbias = triton_path.backward(
        grad_out, grad_lse, query, key, value, indices, index, key_bias, out, lse, block_q, block_k, causal, scale
    )
    return dq, dk, dv, query.new_empty(0, dtype=torch.float32) if dbias is None else dbias


@block_sparse_attention_triton_backward.register_fake
def _(grad_out, grad_lse, query, key, value, indices, index, key_bias, out, lse, block_q, block_k, causal, scale):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    if key_bias is None:
        return *grads, query.new_empty(0, dtype=torch.float32)
    return *grads, torch.empty_like(key_bias, memory_format=torch.contiguous_format)


def check(query: Tensor, key: Tensor, indices: Tensor, index: Tensor | None, block_k: int, causal: bool) -> None:
    """What only the device knows: raise ValueError on block ids out of range and on queries that are not the last
    tokens of their sequence. Waits for the device."""
    num_blocks = -(-key.shape[2] // block_k)
    if indices.numel():
        least, most = (int(x) for x in indices.aminmax())
        if least < -1 or most >= num_blocks:
            raise ValueError(f"indices must lie in -1 (unused) to {num_blocks - 1}, got {least} to {most}")
    if index is not None:
        check_alignment(index, query.shape[2], key.shape[2], causal)


def _save_for_backward(ctx, inputs, output):
    query, key, value, indices, index, key_bias, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, indices, index, key_bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, indices, index, key_bias, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dbias = block_sparse_attention_triton_backward(
        grad_out, grad_lse, query, key, value, indices, index, key_bias, out, lse, *ctx.options
    )
    return dq, dk, dv, None, None, (None if key_bias is None else dbias), None, None, None, None


block_sparse_attention_triton.register_autograd(_backward, setup_context=_save_for_backward)
