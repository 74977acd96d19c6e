"""Paged decoding by Triton kernels: shapes, configurations and launches. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..block_sparse.triton_decode import merge_kernel
from ..launch import config, interpreting, launch
from .pages import Pages
from .triton_kernels import attention_kernel, scores_kernel, statistics_kernel

# Programs that fill a device; a list is split over several while there are fewer.
_ENOUGH_PROGRAMS = 256
_MOST_SPLITS = 64


def page_statistics(key: Tensor, page_size: int, logical_page_size: int) -> Tensor:
    """As `statistics.page_statistics`, without the counts."""
    batch, heads, length, dim = key.shape
    pages = -(-length // page_size)
    stats = key.new_empty(batch, heads, pages, page_size // logical_page_size, 2, dim)
    tile = config("page_statistics", dtype=key.dtype, head_dim=dim, device=key.device)
    tile["CHUNK"] = min(tile["CHUNK"], triton.next_power_of_2(logical_page_size))
    launch(
        statistics_kernel, (pages, heads, batch),
        key, stats, *key.stride(), heads, length, pages, page_size, logical_page_size,
        DIM=dim, WIDTH=triton.next_power_of_2(dim), **tile,
    )  # fmt: skip
    return stats


def page_scores(query: Tensor, stats: Tensor) -> Tensor:
    """fp32 `[B, Hq, pages]`; arguments as `selection.page_scores`."""
    heads, pages, logical, _, dim = stats.shape[1:]
    batch, q_heads = query.shape[:2]
    if stats.stride()[3:] != (2 * dim, dim, 1):
        stats = stats.contiguous()
    # Rounding either would move scores; the wider type holds both.
    query = query.to(torch.promote_types(query.dtype, stats.dtype))
    out = torch.empty(batch, q_heads, pages, dtype=torch.float32, device=query.device)
    tile = config("page_scores", dtype=query.dtype, head_dim=_width(dim), device=query.device)
    group = q_heads // heads
    launch(
        scores_kernel, (-(-pages // tile["BLOCK_N"]), heads, batch),
        query, stats, out, *query.stride(), *stats.stride()[:3], heads, pages, logical,
        DIM=dim, WIDTH=_width(dim), GROUP=group, BLOCK_M=_width(group), UPCAST=_upcast(query, stats), **tile,
    )  # fmt: skip
    return out


def paged_attention(
    query: Tensor,
    key: Pages,
    value: Pages,
    pages: Tensor,
    length: Tensor,
    scale: float,
    current: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """As the torch path. Lists are split over programs and joined (Flash-Decoding); codes are read as they are stored.

    Page numbers that do not exist are ignored. Half-precision queries weigh values in their own type.
    """
    dtype, (batch, q_heads, dim) = query.dtype, query.shape
    lists, width = pages.shape[1:]
    fold, size, value_dim = q_heads // lists, key.page_size, value.head_dim
    for stored in (key, value):
        if stored.bits is None:
            query = query.to(torch.promote_types(query.dtype, stored.data.dtype))
    widths = [_width(p.head_dim // (2 if p.bits == 4 else 1)) for p in (key, value)]
    options = {"dtype": query.dtype, "head_dim": max(_width(dim), _width(value_dim)), "device": query.device}
    tile = config("paged_attention", **options)
    tile["BLOCK_N"] = min(tile["BLOCK_N"], _step_limit(key, value, widths))
    share, splits = _splits(width * size, tile["BLOCK_N"], batch * lists)
    out = query.new_empty(batch, q_heads, value_dim, dtype=dtype)
    parts, lse = out, None
    if splits > 1:
        parts = query.new_empty(splits, batch, q_heads, value_dim, dtype=torch.float32)
        lse = query.new_empty(splits, batch, q_heads, dtype=torch.float32)
    newest = (None, None) if current is None else tuple(x.contiguous() for x in current)
    slots = None if slots is None else slots.contiguous()
    tensors = [t for p in (key, value) for t in (p.data, *_factors(p))]
    launch(
        attention_kernel, (splits, lists, batch),
        query, *tensors, pages.contiguous(), length, slots, *newest, parts, lse,
        *query.stride(), *key.data.stride(), *value.data.stride(), key.data.shape[1], key.data.shape[2], width,
        share, *(window or (0, 0)), lists // key.data.shape[1], scale * LOG2E.value,
        PAGE=size, D=dim, DV=value_dim, WIDTH=widths[0], WIDTH_V=widths[1], KEY_BITS=key.bits or 0,
        VALUE_BITS=value.bits or 0, FOLD=fold, BLOCK_M=_width(fold), WINDOWED=window is not None,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=_upcast(query), **tile,
    )  # fmt: skip
    if splits > 1:
        rows, unused = batch * q_heads, query.new_empty(batch, q_heads, dtype=torch.float32)
        tile = config("block_sparse_merge", **{**options, "head_dim": _width(value_dim)})
        launch(
            merge_kernel, (-(-rows // tile["BLOCK_M"]),),
            parts, lse, out, unused, rows, splits, DV=value_dim, WIDTH_V=_width(value_dim), **tile,
        )  # fmt: skip
    return out


def _step_limit(key: Pages, value: Pages, widths: list[int]) -> int:
    """Tokens of a step that keep the kernel from spilling: rows with columns to mask, and short packed ones, take more
    registers than they fill."""
    ragged = any(p.data.shape[4] != width for p, width in zip((key, value), widths, strict=True))
    if 4 in (key.bits, value.bits):
        return 32 if ragged or max(widths) <= 32 else 256
    return 16 if ragged else 256


def _splits(tokens: int, step: int, running: int) -> tuple[int, int]:
    """Tokens of a list that one program takes, and programs a list, from the shapes alone."""
    tiles = -(-tokens // step)
    splits = max(1, min(_ENOUGH_PROGRAMS // max(running, 1), -(-tiles // 2), _MOST_SPLITS))
    each = max(-(-tiles // splits), 1)
    return each * step, max(-(-tiles // each), 1)


def _factors(pages: Pages) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zero points, contiguous."""
    return tuple(t if t is None else t.contiguous() for t in (pages.scale, pages.zero))


def _width(columns: int) -> int:
    """Columns of a tile: a power of two, and what matrix units need."""
    return max(16, triton.next_power_of_2(columns))


def _upcast(*tensors: Tensor) -> bool:
    return interpreting() and any(t.dtype == torch.bfloat16 for t in tensors)
