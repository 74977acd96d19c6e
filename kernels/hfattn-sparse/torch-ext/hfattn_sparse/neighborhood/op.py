"""Neighborhood attention as a custom op: arguments that a graph can hold, sizes to geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import reference, torch_path
from .geometry import Window


def windows_of(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool]
) -> tuple[Window, ...]:
    """One window an axis."""
    axes = zip(space, kernel, stride, dilation, causal, strict=True)
    return tuple(Window(int(n), int(k), int(s), int(d), bool(c)) for n, k, s, d, c in axes)


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    windows: tuple[Window, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `reference.forward`."""
    count("neighborhood_attention", "reference")
    return reference.forward(query, key, value, rpb, key_mask, windows=windows, scale=scale)


@torch.library.custom_op(add_op_namespace_prefix("neighborhood_attention"), mutates_args=(), tags=HOST_SYNC)
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
    """out `[B, N, Hq, Dv]` and lse `[B, N, Hq]`, which is empty unless `want_lse`.

    Args:
        query, key, value, rpb, key_mask: as in `reference.forward`.
        space: lengths of the axes; kernel, stride, dilation, causal: of each axis.
    """
    count("neighborhood_attention", "torch")
    windows = windows_of(space, kernel, stride, dilation, causal)
    return torch_path.forward(query, key, value, rpb, key_mask, windows=windows, scale=scale, want_lse=want_lse)


@neighborhood_attention.register_fake
def _(query, key, value, rpb, key_mask, space, kernel, stride, dilation, causal, scale, want_lse):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3] if want_lse else (0,), dtype=_stat_dtype(query))


@torch.library.custom_op(add_op_namespace_prefix("neighborhood_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def neighborhood_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and rpb (empty without rpb)."""
    count("neighborhood_attention_backward", "torch")
    windows = windows_of(space, kernel, stride, dilation, causal)
    tensors = (grad_out, grad_lse, query, key, value, rpb, key_mask)
    *grads, grad_rpb = torch_path.backward(*tensors, windows=windows, scale=scale)
    return *(x.contiguous() for x in grads), query.new_empty(0) if grad_rpb is None else grad_rpb


@neighborhood_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, rpb, key_mask, space, kernel, stride, dilation, causal, scale):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    return *grads, query.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    *tensors, space, kernel, stride, dilation, causal, scale, _ = inputs
    ctx.options = space, kernel, stride, dilation, causal, scale
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, rpb, key_mask = ctx.saved_tensors
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
    if grad_lse is not None and not grad_lse.numel():
        grad_lse = None
    tensors = (grad_out, grad_lse, query, key, value, rpb, key_mask)
    *grads, grad_rpb = neighborhood_attention_backward(*tensors, *ctx.options)
    return *grads, None if rpb is None else grad_rpb, *[None] * 8


neighborhood_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _stat_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
