"""Routed attention where every visible block is chosen: the CPU flash kernel that torch ships, where it applies."""

from __future__ import annotations

import torch

from .layout import Geometry


def can_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Geometry) -> bool:
    """The kernel is for the CPU, equal head sizes, contiguous rows, and aligns causal masks at the first key."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and (not shape.causal or shape.q_len == shape.k_len)
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    )


def can_run_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_lse: torch.Tensor | None, shape: Geometry
) -> bool:
    """No gradient of lse, and no sum over heads of gradients that were rounded to half precision."""
    exact = query.dtype in (torch.float32, torch.float64) or query.shape[1] == key.shape[1]
    return grad_lse is None and exact and can_run(query, key, value, shape)


def forward(query, key, value, shape: Geometry, scale: float, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill out [B, Hq, Nq, Dv] and lse [B, Hq, Nq]."""
    for kv, heads in _groups(query, key):
        inputs = query[:, heads], _shared(key, kv, heads), _shared(value, kv, heads)
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, shape.causal, scale=scale
        )
        out[:, heads] = result
        lse[:, heads] = sums


def backward(grad_out, query, key, value, shape: Geometry, scale: float, out, lse, grads) -> None:
    """Fill grads = (dq, dk, dv)."""
    grad_query, grad_key, grad_value = grads
    for kv, heads in _groups(query, key):
        inputs = query[:, heads], _shared(key, kv, heads), _shared(value, kv, heads)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, heads], *inputs, out[:, heads], lse[:, heads], 0.0, shape.causal, scale=scale
        )
        grad_query[:, heads] = dq
        grad_key[:, kv] = dk.sum(1)
        grad_value[:, kv] = dv.sum(1)


def _groups(query: torch.Tensor, key: torch.Tensor) -> list[tuple[int, slice]]:
    group = query.shape[1] // key.shape[1]
    return [(kv, slice(kv * group, (kv + 1) * group)) for kv in range(key.shape[1])]


def _shared(tensor: torch.Tensor, kv: int, heads: slice) -> torch.Tensor:
    """One key head as a view for all query heads that read it."""
    return tensor[:, kv : kv + 1].expand(-1, heads.stop - heads.start, -1, -1)
