"""Which implementation of an op runs, and the checks every op makes of its tensors."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from hf_attn.call import TokenLayout

Path = Literal["reference", "torch"]
_VARIABLE = "HF_ATTN_BACKEND"


def forced_backend() -> str | None:
    """The value of HF_ATTN_BACKEND, `None` when unset or "auto"; raises ValueError on anything unknown."""
    value = os.environ.get(_VARIABLE, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value not in ("reference", "torch", "triton"):
        raise ValueError(f"{_VARIABLE}={value!r} is unknown; allowed: auto, reference, torch, triton")
    return value


def choose_path(op: str) -> Path:
    """The path `op` takes: the forced one, or "torch". Raises RuntimeError when the forced one cannot run."""
    forced = forced_backend()
    if forced == "triton":
        raise RuntimeError(
            f"{_VARIABLE}=triton cannot run: {op} has no Triton path in this version. "
            f"Unset {_VARIABLE}, or set it to 'torch' or 'reference'."
        )
    return "reference" if forced == "reference" else "torch"


def may_go_dense() -> bool:
    """Whether a mechanism or path may compute densely because that is faster: never under a forced backend."""
    return forced_backend() is None


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three fit together; names the argument and its shape."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must agree in batch, heads and tokens, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"the number of query heads ({query.shape[1]}) must be a multiple of the number of KV heads "
            f"({key.shape[1]})"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}; cast them"
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype when autocast is on for their device (custom ops are opaque to it)."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def resolve_tokens(
    query: Tensor,
    key: Tensor,
    tokens: TokenLayout | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | int | None,
    key_length: Tensor | None,
) -> Tensor | None:
    """The token index of whichever way the caller described the rows; `None` when all of them are full."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    padded = key_length is not None or key_start is not None
    if packed + padded + (tokens is not None) > 1:
        raise ValueError("give one of tokens=, cu_seqlens_q / cu_seqlens_k, or key_start / key_length, not several")
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if packed:
        if batch != 1:
            raise ValueError(f"packed sequences (cu_seqlens_*) need batch 1, got query batch {batch}")
        cu_q = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        tokens = TokenLayout.packed(cu_q, cu_k, q_len, k_len)
    elif padded:
        start = 0 if key_start is None else key_start
        if key_length is None:
            key_length = k_len - torch.as_tensor(start, device=key.device).expand(batch)
        tokens = TokenLayout.padded(start, key_length, q_len, k_len)
    if tokens is None:
        return None
    if tokens.window is not None or tokens.dense is not None:
        raise ValueError(
            "sparse ops take full, padded or packed rows; this TokenLayout holds a window or an arbitrary mask. "
            "Use ops.dense_attention, or express it as a BlockPattern."
        )
    if (tokens.batch, tokens.q_len, tokens.k_len) != (batch, q_len, k_len):
        raise ValueError(
            f"tokens describes batch {tokens.batch}, {tokens.q_len} queries and {tokens.k_len} keys, but the tensors "
            f"have {batch}, {q_len} and {k_len}"
        )
    return tokens.index
