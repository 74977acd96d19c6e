"""Which implementation of an op runs, and the checks every op makes of its tensors."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from hf_attn.call import TokenLayout

Path = Literal["reference", "torch", "triton"]


class Rows(TypedDict, total=False):
    """Where the sequences of a batch lie, said the same way in every op: one of these, or none for full rows."""

    tokens: TokenLayout | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_start: Tensor | int | None
    key_length: Tensor | None


_VARIABLE = "HF_ATTN_BACKEND"
# The torch path with the compiled CPU kernel inside, which is otherwise used where it is built and pays.
_NATIVE = "native"
NATIVE_OPS = frozenset(
    {
        "block_sparse_attention",
        "document_attention",
        "head_routed_attention",
        "neighborhood_attention",
        "pyramid_attention",
        "routed_block_attention",
    }
)
# What attention ops are given by these runs beside them in torch, so that whole mechanisms can be forced.
_CHOOSING_OPS = frozenset({"block_scores", "select_blocks", "select_pooled_routes", "select_routes"})
_CHECK_VARIABLE = "HF_ATTN_CHECK"
# Ops that have a Triton path.
TRITON_OPS = frozenset(
    {
        "block_sparse_attention",
        "head_routed_attention",
        "neighborhood_attention",
        "linear_attention",
        "page_scores",
        "page_statistics",
        "paged_attention",
        "pyramid_attention",
        "quantized_block_attention",
        "routed_block_attention",
        "select_blocks",
        "select_routes",
        "sink_window_attention",
    }
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_DEVICES = ("cuda", "xpu")
TRITON_HEAD_DIMS = "multiples of 8 from 8 to 256"


def forced_backend() -> Path | None:
    """The path that HF_ATTN_BACKEND forces, `None` when unset or "auto"; raises ValueError on anything unknown.

    "native", the compiled CPU kernel, is a way of the torch path.
    """
    value = os.environ.get(_VARIABLE, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value == _NATIVE:
        return "torch"
    for path in get_args(Path):
        if value == path:
            return path
    raise ValueError(f"{_VARIABLE}={value!r} is unknown; allowed: auto, reference, torch, native, triton")


def checks_enabled() -> bool:
    """Whether HF_ATTN_CHECK=1 asks for checks of values, which wait for the device; never inside compiled graphs."""
    return os.environ.get(_CHECK_VARIABLE) == "1" and not torch.compiler.is_compiling()


def choose_path(op: str, query: Tensor, *head_dims: int) -> Path:
    """The path `op` takes: the forced one, else "triton" on a GPU and "torch" elsewhere.

    Args:
        op: name of the op, for messages.
        query: a tensor of the call: its device and dtype decide.
        head_dims: head dimensions of the call (query and value), which Triton kernels restrict.

    Raises RuntimeError when the forced path cannot run. What a GPU's Triton path does not support runs on "torch", with
    one warning for each reason.
    """
    forced = forced_backend()
    if forced == "torch" and op not in NATIVE_OPS | _CHOOSING_OPS and os.environ[_VARIABLE].strip().lower() == _NATIVE:
        raise RuntimeError(
            f"{_VARIABLE}=native cannot run {op}: only {', '.join(sorted(NATIVE_OPS))} have a compiled CPU kernel. "
            f"Unset {_VARIABLE}, or set it to 'torch' or 'reference'."
        )
    if forced in ("reference", "torch"):
        return forced
    if forced is None and query.device.type not in _TRITON_DEVICES:
        return "torch"
    obstacle = triton_obstacle(query, head_dims) if op in TRITON_OPS else "it has no Triton path in this version"
    if obstacle is None:
        return "triton"
    if forced == "triton":
        raise RuntimeError(
            f"{_VARIABLE}=triton cannot run {op}: {obstacle}. Unset {_VARIABLE}, or set it to 'torch' or 'reference'."
        )
    _warn_once(f"{op} takes its torch path: {obstacle}")
    return "torch"


def triton_obstacle(query: Tensor, head_dims: Sequence[int] = ()) -> str | None:
    """Why a Triton kernel cannot take this tensor, or None.

    query: `[B, H, N, D]`, whose device and dtype count; head_dims: of the call, which kernels restrict.
    """
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton)"
    device = query.device.type
    if device not in (*_TRITON_DEVICES, "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device!r}, and Triton kernels need a GPU (or its interpreter, TRITON_INTERPRET=1)"
    if query.dtype not in _TRITON_DTYPES:
        return f"Triton kernels take float16, bfloat16 and float32, got {query.dtype}"
    for head_dim in head_dims:
        if head_dim % 8 or not 8 <= head_dim <= 256:
            return f"Triton kernels take head dimensions that are {TRITON_HEAD_DIMS}, got {head_dim}"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def may_go_dense() -> bool:
    """Whether a mechanism or path may compute densely because that is faster: never under a forced backend."""
    return forced_backend() is None


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three fit together; names the argument and its shape.

    Allowed are `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]` and `[B, Hkv, Nk, Dv]` in one floating-point dtype, `Hq % Hkv == 0`.
    """
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


# Others, meta among them, do not even say whether autocast is on. Asked here, for torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype when autocast is on for their device (custom ops are opaque to it).

    Any shapes `[...]`; fp64 and integer tensors stay as they are.
    """
    device = tensors[0].device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
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
    """The token index of whichever way the caller described the rows; `None` when all of them are full.

    query and key are `[B, Hq, Nq, D]` and `[B, Hkv, Nk, D]`; the index is int32 `[B, 2, Nq + Nk]` (see `TokenLayout`).

    Raises ValueError for more than one description, one that does not fit the tensors, and windows, masks and
    documents, which sparse ops do not follow.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    padded = key_length is not None or key_start is not None
    if packed + padded + (tokens is not None) > 1:
        raise ValueError("give one of tokens=, cu_seqlens_q / cu_seqlens_k, or key_start / key_length, not several")
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if batch != 1:
            raise ValueError(f"packed sequences (cu_seqlens_*) need batch 1, got query batch {batch}")
        cu_q = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        assert cu_q is not None and cu_k is not None  # one was given, and stands for a missing other
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
    if tokens.roles is not None:
        raise ValueError(
            "this TokenLayout describes a prompt of documents, which only ops.document_attention (mechanism "
            "'blockrank') follows; use ops.dense_attention for the same result without the speed"
        )
    if (tokens.batch, tokens.q_len, tokens.k_len) != (batch, q_len, k_len):
        raise ValueError(
            f"tokens describes batch {tokens.batch}, {tokens.q_len} queries and {tokens.k_len} keys, but the tensors "
            f"have {batch}, {q_len} and {k_len}"
        )
    return tokens.index
