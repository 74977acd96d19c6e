"""Attention of tiles of rows over lists of key segments by the compiled kernel; who has tiles describes them here."""

from __future__ import annotations

import ctypes
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .library import has_matrix_tiles, library

_VARIABLE = "HF_ATTN_BACKEND"
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# Sampled keys of a block whose scores the kernel holds at one time.
MOST_SAMPLES = 128
_NO_MEMORY = "the compiled CPU attention ran out of memory for keys and scratch; use shorter sequences"
_REMEDY = "set HF_ATTN_BACKEND to 'torch' or unset it"


class Rows(NamedTuple):
    """The query rows of all tiles as runs: rows at the stride of the query's dimension -2, with rising positions.

    starts: int64 `[T + 1]`, where the runs of each tile begin; offsets: int64 `[runs]`, element of a run's first
    number in the memory of the query; numbers: int64 `[runs]`, its first row in the results, seen as `[all rows, Dv]`;
    lengths: int32 `[runs]`; positions: int32 `[runs]`, the last key position that its first row sees, or None when
    every row sees everything in its list.
    """

    starts: Tensor
    offsets: Tensor
    numbers: Tensor
    lengths: Tensor
    positions: Tensor | None


class Segments(NamedTuple):
    """Runs of keys. keys, values: int64 `[S]`, elements of the first ones in memory; lengths: int32 `[S]`.

    low, high: int32 `[S]`, the least and the greatest position in each, which go up by one.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    low: Tensor
    high: Tensor
    pools: Pools | None = None


class Pools(NamedTuple):
    """Keys that stand for several tokens each: the mean of their keys, the sum of their values.

    sizes: int32 `[S]`, tokens of a key; tokens: int32 `[S]`, of a segment, past which the last one is repeated
    (`replicate`) or nothing counts. offsets: int64 `[S]`, where a segment begins in positions (int32, of every key, or
    None: as without pools) and weights (fp32, of every key in the softmax's denominator).
    """

    sizes: Tensor
    tokens: Tensor
    replicate: bool
    offsets: Tensor
    positions: Tensor | None
    weights: Tensor


class Lists(NamedTuple):
    """The segments that each tile reads. starts: int64 `[T + 1]`; segments: int64 `[all]`."""

    starts: Tensor
    segments: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, segments: Tensor) -> Lists:
        """mask bool `[T, M]`, segments int64 `[T, M]`: those where the mask is true."""
        counts = mask.sum(1)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=starts[1:])
        return cls(starts, segments[mask])


def wanted() -> bool:
    """Whether HF_ATTN_BACKEND=native asks for this kernel, so that a call it cannot take has to fail."""
    return os.environ.get(_VARIABLE, "").strip().lower() == "native"


def obstacle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    """Why the kernel does not take these tensors, or None. Under HF_ATTN_BACKEND=native that is a RuntimeError."""
    reason = _obstacle(query, key, value, scale)
    if reason is not None and wanted():
        raise RuntimeError(f"HF_ATTN_BACKEND=native cannot run this call: {reason}; {_REMEDY}")
    return reason


def possible(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the kernel takes these tensors, for steps beside an op's main one, which nothing forces."""
    return _obstacle(query, key, value, scale) is None


def pays(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel is faster than torch's fused attention on the same pairs.

    query, value: `[..., D]`, `[..., Dv]`, which the kernel takes. In bfloat16 it is so on the processor's matrix units
    only, which want head dimensions that are multiples of 32.
    """
    if query.dtype == torch.float32:
        return True
    return has_matrix_tiles() and query.shape[-1] % 32 == value.shape[-1] % 32 == 0


def refuse(reason: str) -> None:
    """Raise RuntimeError for a call that the kernel cannot take, if HF_ATTN_BACKEND=native asks for it."""
    if wanted():
        raise RuntimeError(f"HF_ATTN_BACKEND=native cannot run this call: {reason}; {_REMEDY}")


def _obstacle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    if os.environ.get(_VARIABLE, "").strip().lower() not in ("", "auto", "native"):
        return f"{_VARIABLE} asks for another path"
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type!r}, and the kernel runs on a CPU"
    if query.dtype not in _TYPES:
        return f"it takes float32 and bfloat16, got {query.dtype}"
    if not (scale > 0 and math.isfinite(scale)):
        return f"scale must be positive and finite, got {scale}"
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (query, key, value)):
        return "the numbers of a head must lie side by side (stride 1 in the last dimension)"
    if library() is None:
        return "the kernel is not built (hf-attn build-cpu)"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    segments: Segments,
    lists: Lists,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Write out `[..., Dv]` (the query's dtype) and lse `[...]` (fp32, natural logarithm) at the rows' numbers.

    Returns whether all of out is finite. A row that sees nothing gives 0 and -inf. Hidden keys weigh 0, but 0 times a
    NaN or an infinity among their values is NaN. The result is the same on any number of threads.

    out and lse: contiguous. query, key, value: `[..., tokens, D]`, for which `obstacle` is None; the keys of a segment
    lie at the stride of dimension -2.

    Raises MemoryError.
    """
    loaded = library()
    assert loaded is not None  # `obstacle` has looked
    pools = segments.pools or (None, None, False, None, None, None)
    outcome = loaded.hfa_attend(
        _TYPES[query.dtype], *_pointers(query, key, value, out, lse), query.shape[-1], value.shape[-1],
        query.stride(-2), key.stride(-2), value.stride(-2), scale, len(rows.starts) - 1, *_pointers(*rows),
        len(segments.keys), *_pointers(*segments[:5]), *_pointers(*pools[:2]), int(pools[2]), *_pointers(*pools[3:]),
        *_pointers(*lists), out.numel() // max(value.shape[-1], 1), torch.get_num_threads(),
    )  # fmt: skip
    if outcome & 1:
        raise MemoryError(_NO_MEMORY)
    return not outcome & 2


class Windows(NamedTuple):
    """Tiles of single query rows and single keys, the same for every head.

    q_offsets, k_offsets, v_offsets, numbers: int64 `[heads]`, first element in memory and first row in the results;
    q_places `[tiles, size]`, k_places, v_places `[tiles, keys]`: int64, elements from there; rows: int64
    `[tiles, size]`, from a head's first row in the results in steps of `step`, -1 for padding; tables: fp32
    `[tables, strips, keys, strip_rows()]`, added to scores times log2(e), -inf hides a key; table_of: int64
    `[heads, tiles]`, -1 for none.
    """

    q_offsets: Tensor
    k_offsets: Tensor
    v_offsets: Tensor
    numbers: Tensor
    q_places: Tensor
    k_places: Tensor
    v_places: Tensor
    rows: Tensor
    tables: Tensor
    table_of: Tensor
    step: int


def attend_windows(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows, scale: float, out: Tensor, lse: Tensor
) -> bool:
    """As `attend`, for `Windows`: writes out and lse, and returns whether all of out is finite. Raises MemoryError."""
    loaded = library()
    assert loaded is not None  # `obstacle` has looked
    outcome = loaded.hfa_windows(
        _TYPES[query.dtype], *_pointers(query, key, value, out, lse), query.shape[-1], value.shape[-1], scale,
        len(windows.numbers), *windows.q_places.shape, windows.k_places.shape[1], windows.step,
        *_pointers(*windows[:10]), out.numel() // max(value.shape[-1], 1), torch.get_num_threads(),
    )  # fmt: skip
    if outcome & 1:
        raise MemoryError(_NO_MEMORY)
    return not outcome & 2


def attend_routed(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block_size: int, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write out `[B, Hq, Nq, Dv]` (the query's dtype) and lse `[B, Hq, Nq]` (fp32, natural logarithm), both contiguous.

    query: `[B, Hq, Nq, D]`; key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`, for which `obstacle` is None.
    chosen: bool `[B, Hq, ceil(Nk / block_size), Nq]`, whether a row reads a block; the last two dimensions contiguous.
    A row touches no other keys, so those may hold anything. One without blocks gives 0 and -inf. The result is the same
    on any number of threads.

    Raises MemoryError.
    """
    loaded = library()
    assert loaded is not None  # `obstacle` has looked
    chosen = chosen.flatten(0, 1)
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (query, key, value)]
    failed = loaded.hfa_attend_routed(
        _TYPES[query.dtype], *_pointers(query, key, value, out, lse), query.shape[-1], value.shape[-1], *strides, scale,
        *query.shape[:2], key.shape[1], query.shape[2], key.shape[2], block_size, chosen.data_ptr(), chosen.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(_NO_MEMORY)


def importance(query: Tensor, key: Tensor, q_tokens: Tensor, k_tokens: Tensor, scale: float) -> Tensor:
    """fp32 `[B, Hq, nq, nk]`: the largest softmax weight that a sampled row of a query block gives to a sampled key of
    a key block; the softmax runs over all sampled keys.

    query, key: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, for which `obstacle` is None; q_tokens, k_tokens: int64
    `[B, Hq, nq | nk, samples]`, at most `MOST_SAMPLES` of keys.

    Raises MemoryError.
    """
    loaded = library()
    assert loaded is not None  # `obstacle` has looked
    batch, heads = query.shape[:2]
    rows = [
        (
            tokens * x.stride(2)
            + (torch.arange(heads) // (heads // x.shape[1]) * x.stride(1))[:, None, None]
            + (torch.arange(batch) * x.stride(0))[:, None, None, None]
        )
        for x, tokens in ((query, q_tokens), (key, k_tokens))
    ]
    out = torch.empty(batch, heads, q_tokens.shape[2], k_tokens.shape[2])
    failed = loaded.hfa_importance(
        _TYPES[query.dtype], *_pointers(query, key, out), query.shape[-1], scale, batch * heads, *q_tokens.shape[2:],
        *k_tokens.shape[2:], *_pointers(*rows), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(_NO_MEMORY)
    return out


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]
