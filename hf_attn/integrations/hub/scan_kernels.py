"""Selective-scan kernels of others with the arguments of `ops.selective_scan`: mamba_ssm, and its build on the Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hf_attn.ops import selective_scan
from hf_attn.ops.backend import forced_backend

BACKENDS = ("auto", "torch", "mamba_ssm", "hub")
HUB_KERNEL = "kernels-community/mamba-ssm"


def scan_of(backend: str) -> Callable[..., Tensor]:
    """The scan by name; called like `ops.selective_scan`, without states and masks.

    "torch" is our op. "mamba_ssm" is the installed package, "hub" the kernel `kernels-community/mamba-ssm` (package
    `kernels`); both need CUDA tensors and are looked up at the first call. "auto" takes mamba_ssm for CUDA tensors
    where it is installed and HF_ATTN_BACKEND forces no path, our op otherwise. Raises ValueError for other names.
    """
    if backend not in BACKENDS:
        raise ValueError(f"scan_backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "torch":
        return selective_scan
    return _auto if backend == "auto" else partial(_foreign, backend)


def _auto(u: Tensor, *operands: Tensor, **options: Any) -> Tensor:
    able = u.is_cuda and u.dtype != torch.float64 and forced_backend() is None
    if able and importlib.util.find_spec("mamba_ssm") is not None:
        return _foreign("mamba_ssm", u, *operands, **options)
    return selective_scan(u, *operands, **options)


def _foreign(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One call for all groups: their channels side by side, time last."""
    if not u.is_cuda:
        raise ValueError(
            f"scan_backend={backend!r} needs CUDA tensors, got {u.device.type}; use scan_backend='auto' or 'torch'"
        )
    run = _kernel(backend)
    flat = [None if t is None else t.flatten(0, 1).float() for t in (A, D, delta_bias)]
    u_flat, delta_flat = (t.to(u.dtype).mT.flatten(1, 2).contiguous() for t in (u, delta))
    maps = [t.to(u.dtype).mT.contiguous() for t in (B, C)]
    y = run(u_flat, delta_flat, flat[0], *maps, flat[1], delta_bias=flat[2], delta_softplus=delta_softplus)
    return y.unflatten(1, u.shape[1:2] + u.shape[3:]).mT


@cache
def _kernel(backend: str) -> Callable[..., Tensor]:
    if backend == "hub":
        try:
            from kernels import get_kernel
        except ImportError as error:
            raise ImportError(
                "scan_backend='hub' needs the package kernels: pip install kernels; or use scan_backend='torch'"
            ) from error
        return get_kernel(HUB_KERNEL).selective_scan_fn
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError(
            "scan_backend='mamba_ssm' needs the package mamba_ssm; use scan_backend='auto' or 'torch'"
        ) from error
    return selective_scan_fn
