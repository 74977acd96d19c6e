"""The site's attention as one opaque op, so that compiled graphs carry two small CPU tensors and no Python state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn.integrations.diffusers.attend import attend, gradients

# A replayed CUDA graph runs no Python: the step would freeze.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


@torch.library.custom_op("hf_attn::site_attention", mutates_args=(), tags=_TAGS)
def site_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    numbers: Tensor,
    scale: float,
    rank: int,
    ranks: int,
) -> Tensor:
    """`attend` with the same arguments; the result is contiguous `[B, H, S, Dv]`."""
    out = attend(query, key, value, mask, handle, numbers, scale, rank, ranks).contiguous()
    return out.clone() if out.data_ptr() in (query.data_ptr(), key.data_ptr(), value.data_ptr()) else out


@site_attention.register_fake
def _fake(query, key, value, mask, handle, numbers, scale, rank, ranks):
    # Not empty_like: that would copy the strides of a permuted query.
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, handle, numbers, *rest = inputs
    # The grid's numbers are overwritten by the next forward.
    ctx.save_for_backward(query, key, value, mask, handle, numbers.clone())
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute, then differentiate: what a mechanism saves does not pass through the op."""
    query, key, value, mask, handle, numbers = ctx.saved_tensors
    grads = site_gradients(query, key, value, mask, handle, numbers, grad, *ctx.rest)
    return *grads, *[None] * 6


@torch.library.custom_op("hf_attn::site_gradients", mutates_args=(), tags=_TAGS)
def site_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    numbers: Tensor,
    grad: Tensor,
    scale: float,
    rank: int,
    ranks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `site_attention` in query, key and value."""
    # Inside an op autograd is switched off below the level that `enable_grad` reaches.
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        found = gradients(query, key, value, mask, handle, numbers, grad, scale, rank, ranks)
    of_query, of_key, of_value = (x.contiguous() for x in found)
    return of_query, of_key, of_value


@site_gradients.register_fake
def _fake_gradients(query, key, value, mask, handle, numbers, grad, scale, rank, ranks):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


site_attention.register_autograd(_backward, setup_context=_save)
