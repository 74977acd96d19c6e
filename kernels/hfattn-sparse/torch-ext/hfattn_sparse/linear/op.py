"""Linear attention as a custom op; packed sequences are cut here, one core call computes each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import reference, torch_path


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `linear_attention`."""
    count("linear_attention", "reference")
    if cu_seqlens is None:
        return reference.forward(query, key, value, slopes, state, scale)
    parts = [
        reference.forward(*(_cut(t, rows) for t in (query, key, value)), _cut_slopes(slopes, rows), initial, scale)
        for rows, initial in _sequences(cu_seqlens, state)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([final for _, final in parts])


@torch.library.custom_op(add_op_namespace_prefix("linear_attention"), mutates_args=(), tags=HOST_SYNC)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """out `[B, H, N, E]` and final state `[B | sequences, H, D, E]`; cu_seqlens int `[sequences + 1]` or None."""
    count("linear_attention", "torch")
    out = query.new_empty(*query.shape[:3], value.shape[3])
    if cu_seqlens is None and query.shape[2] == 1:
        return out, torch_path.step(query, key, value, slopes, state, scale, out)
    if cu_seqlens is None:
        return out, torch_path.forward(query, key, value, slopes, state, scale, block, out)
    finals = []
    for rows, initial in _sequences(cu_seqlens, state):
        picked = [_cut(t, rows) for t in (query, key, value)]
        finals.append(torch_path.forward(*picked, _cut_slopes(slopes, rows), initial, scale, block, _cut(out, rows)))
    return out, torch.cat(finals)


@linear_attention.register_fake
def empty_results(query, key, value, slopes, state, cu_seqlens, scale, block):
    """What a forward op returns, without values."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = query.new_empty(rows, query.shape[1], query.shape[3], value.shape[3], dtype=dtype)
    return query.new_empty(*query.shape[:3], value.shape[3]), final


@torch.library.custom_op(add_op_namespace_prefix("linear_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def linear_attention_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the initial state."""
    count("linear_attention_backward", "torch")
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    if cu_seqlens is None:
        initial = torch_path.backward(grad_out, grad_state, query, key, value, slopes, state, scale, block, grads)
        return *grads, initial
    initials = []
    for number, (rows, initial) in enumerate(_sequences(cu_seqlens, state)):
        picked = [_cut(t, rows) for t in (query, key, value)]
        into = tuple(_cut(t, rows) for t in grads)
        options = (_cut_slopes(slopes, rows), initial, scale, block, into)
        initials.append(torch_path.backward(_cut(grad_out, rows), grad_state[number : number + 1], *picked, *options))
    return *grads, torch.cat(initials)


def save_for_backward(ctx, inputs, output):
    query, key, value, slopes, state, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, slopes, state, cu_seqlens)
    ctx.set_materialize_grads(True)


def backward_by(op):
    """The autograd rule of a forward op whose gradients `op` computes."""

    def backward(ctx, grad_out, grad_state):
        saved = ctx.saved_tensors  # once only: activation checkpointing forbids a second look
        grads = op(grad_out, grad_state, *saved, *ctx.options)
        state = saved[4]
        grad_initial = None if state is None else grads[3].to(state.dtype)
        return *grads[:3], None, grad_initial, None, None, None

    return backward


def empty_gradients(grad_out, grad_state, query, key, value, slopes, state, cu_seqlens, scale, block):
    """What a backward op returns, without values."""
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    return *grads, torch.empty_like(grad_state, memory_format=torch.contiguous_format)


linear_attention_backward.register_fake(empty_gradients)
linear_attention.register_autograd(backward_by(linear_attention_backward), setup_context=save_for_backward)


def _sequences(cu_seqlens: Tensor, state: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Rows of every packed sequence and its initial state `[1, H, D, E]`."""
    ends = cu_seqlens.tolist()
    return [
        (slice(start, stop), None if state is None else state[number : number + 1])
        for number, (start, stop) in enumerate(zip(ends, ends[1:], strict=False))
    ]


def _cut(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[:, :, rows]


def _cut_slopes(slopes: Tensor, rows: slice) -> Tensor:
    return slopes if slopes.dim() == 1 else slopes[..., rows]
