"""Scores and mixing of neighborhood attention apart, as custom ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from . import reference, torch_unfused
from .geometry import Window
from .op import windows_of


def run_scores_reference(query: Tensor, key: Tensor, rpb: Tensor | None, windows: tuple[Window, ...]) -> Tensor:
    """`reference.scores` under plain autograd."""
    count("na_qk", "reference")
    return reference.scores(query, key, rpb, windows=windows)


def run_values_reference(weights: Tensor, value: Tensor, windows: tuple[Window, ...]) -> Tensor:
    """`reference.weighted_values` under plain autograd."""
    count("na_av", "reference")
    return reference.weighted_values(weights, value, windows=windows)


@torch.library.custom_op(add_op_namespace_prefix("na_qk"), mutates_args=())
def na_qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    space: list[int],
    kernel: list[int],
    dilation: list[int],
    causal: list[bool],
) -> Tensor:
    """`[B, H, N, prod K]`; see `reference.scores`."""
    count("na_qk", "torch")
    return torch_unfused.scores(query, key, rpb, windows=_windows(space, kernel, dilation, causal)).contiguous()


@na_qk.register_fake
def _(query, key, rpb, space, kernel, dilation, causal):
    return query.new_empty(*query.shape[:3], math.prod(kernel))


@torch.library.custom_op(add_op_namespace_prefix("na_qk_backward"), mutates_args=())
def na_qk_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    space: list[int],
    kernel: list[int],
    dilation: list[int],
    causal: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and rpb (empty without rpb)."""
    count("na_qk_backward", "torch")
    windows = _windows(space, kernel, dilation, causal)
    dq, dk, drpb = torch_unfused.scores_backward(grad, query, key, rpb, windows=windows)
    return dq.contiguous(), dk.contiguous(), query.new_empty(0) if drpb is None else drpb


@na_qk_backward.register_fake
def _(grad, query, key, rpb, space, kernel, dilation, causal):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key)]
    return *grads, query.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)


def _save_scores(ctx, inputs, output):
    query, key, rpb, *ctx.options = inputs
    ctx.save_for_backward(query, key, rpb)


def _scores_backward(ctx, grad):
    query, key, rpb = ctx.saved_tensors
    dq, dk, drpb = na_qk_backward(grad, query, key, rpb, *ctx.options)
    return dq, dk, None if rpb is None else drpb, *[None] * 4


na_qk.register_autograd(_scores_backward, setup_context=_save_scores)


@torch.library.custom_op(add_op_namespace_prefix("na_av"), mutates_args=())
def na_av(
    weights: Tensor, value: Tensor, space: list[int], kernel: list[int], dilation: list[int], causal: list[bool]
) -> Tensor:
    """`[B, H, N, Dv]`; see `reference.weighted_values`."""
    count("na_av", "torch")
    windows = _windows(space, kernel, dilation, causal)
    return torch_unfused.weighted_values(weights, value, windows=windows).contiguous()


@na_av.register_fake
def _(weights, value, space, kernel, dilation, causal):
    return value.new_empty(value.shape)


@torch.library.custom_op(add_op_namespace_prefix("na_av_backward"), mutates_args=())
def na_av_backward(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    space: list[int],
    kernel: list[int],
    dilation: list[int],
    causal: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and value."""
    count("na_av_backward", "torch")
    windows = _windows(space, kernel, dilation, causal)
    grads = torch_unfused.weighted_values_backward(grad, weights, value, windows=windows)
    return tuple(x.contiguous() for x in grads)


@na_av_backward.register_fake
def _(grad, weights, value, space, kernel, dilation, causal):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weights, value))


def _save_values(ctx, inputs, output):
    weights, value, *ctx.options = inputs
    ctx.save_for_backward(weights, value)


def _values_backward(ctx, grad):
    grads = na_av_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 4


na_av.register_autograd(_values_backward, setup_context=_save_values)


def _windows(space: list[int], kernel: list[int], dilation: list[int], causal: list[bool]) -> tuple[Window, ...]:
    return windows_of(space, kernel, [1] * len(space), dilation, causal)
