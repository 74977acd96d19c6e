"""Attention by a grouped softmax as a custom op: sequences are cut out here, one core call computes each of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, Rows, split_sequences, take
from . import reference, torch_path
from .groups import Groups, groups_of, regular_groups


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None,
    index: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `grouped_softmax_attention`."""
    count("grouped_softmax_attention", "reference")
    out, lse = _empty(query, value)
    for s in split_sequences(index, query.shape[2], key.shape[2], True):
        picked = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        if landmarks is None:
            ranks = torch.arange(picked[1].shape[2], device=query.device)
            flags = (ranks % block_size == block_size - 1)[None]
        else:
            flags = landmarks[s.batch][:, s.k]
        part = reference.forward(*picked, flags, scale)
        if index is None:
            return part
        out[s.batch, :, s.q], lse[s.batch, :, s.q] = part
    return out, lse


@torch.library.custom_op(add_op_namespace_prefix("grouped_softmax_attention"), mutates_args=(), tags=HOST_SYNC)
def grouped_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None,
    index: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    landmarks: bool `[B, Nk]`; None puts one at every `block_size`-th token of a sequence. index: a token index int32
    `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
    """
    count("grouped_softmax_attention", "torch")
    out, lse = _empty(query, value)
    for batch, q, k, groups in _pieces(query, key, landmarks, index, block_size):
        picked = take(query, batch, q), take(key, batch, k), take(value, batch, k)
        out[batch, :, q], lse[batch, :, q] = torch_path.forward(*picked, groups, scale)
    return out, lse


@grouped_softmax_attention.register_fake
def _(query, key, value, landmarks, index, block_size, scale):
    return _empty(query, value)


@torch.library.custom_op(add_op_namespace_prefix("grouped_softmax_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def grouped_softmax_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None,
    index: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    count("grouped_softmax_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    for batch, q, k, groups in _pieces(query, key, landmarks, index, block_size):
        rows = [take(x, batch, q) for x in (grad_out, grad_lse, query)]
        parts = torch_path.backward(*rows, take(key, batch, k), take(value, batch, k), groups, scale)
        for grad, part, where in zip(grads, parts, (q, k, k), strict=True):
            grad[batch, :, where] = part
    return tuple(grads)


@grouped_softmax_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, landmarks, index, block_size, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, landmarks, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, landmarks, index)


def _backward(ctx, grad_out, grad_lse):
    grads = grouped_softmax_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


grouped_softmax_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _empty(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Results of rows that see nothing."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    return query.new_zeros(*query.shape[:3], value.shape[3]), lse


def _pieces(
    query: Tensor, key: Tensor, landmarks: Tensor | None, index: Tensor | None, block_size: int
) -> Iterator[tuple[slice, Rows, Rows, Groups]]:
    """Batch rows, query rows, keys and blocks of parts whose rows all have the same blocks."""
    for s in split_sequences(index, query.shape[2], key.shape[2], True):
        q_len, k_len = take(query, s.batch, s.q).shape[2], take(key, s.batch, s.k).shape[2]
        if landmarks is None:
            yield s.batch, s.q, s.k, regular_groups(block_size, q_len, k_len, key.device)
            continue
        flags = landmarks[s.batch][:, s.k]
        if bool((flags == flags[:1]).all()):
            yield s.batch, s.q, s.k, groups_of(flags[0], q_len)
            continue
        first = s.batch.start or 0
        for row in range(flags.shape[0]):
            yield slice(first + row, first + row + 1), s.q, s.k, groups_of(flags[row], q_len)
