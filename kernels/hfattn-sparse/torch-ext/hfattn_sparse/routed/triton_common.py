"""Device functions that the kernels of routed attention share."""

from __future__ import annotations

import triton
import triton.language as tl


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()


@triton.jit
def block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE: tl.constexpr, HAS_INDEX: tl.constexpr):
    """First key slot and number of keys of a block of this batch row; int32 table [B, T, 6] (see `tables.py`)."""
    if HAS_INDEX:
        entry = table + (batch.to(tl.int64) * num_blocks + block) * 6
        return tl.load(entry), tl.load(entry + 1)
    else:
        first = block * BLOCK_SIZE
        return first, tl.minimum(k_len - first, BLOCK_SIZE)


@triton.jit
def query_tokens(table, batch, tile, num_tiles, q_len, k_len, BLOCK_M: tl.constexpr, HAS_INDEX: tl.constexpr):
    """Of a tile of queries: first slot, length, position of the first, and first key slot and keys of its sequence."""
    if HAS_INDEX:
        entry = table + (batch.to(tl.int64) * num_tiles + tile) * 6
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    else:
        first = tile * BLOCK_M
        return first, tl.minimum(q_len - first, BLOCK_M), first + k_len - q_len, 0, k_len


@triton.jit
def rows_of(slots, table, batch, length, mask, HAS_INDEX: tl.constexpr):
    """Rows of the tensor behind slots, int64; int32 table [B, length]."""
    if HAS_INDEX:
        return tl.load(table + batch.to(tl.int64) * length + slots, mask=mask, other=0).to(tl.int64)
    else:
        return slots.to(tl.int64)


@triton.jit
def load_tile(
    pointer, rows, mask, stride_row, stride_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows [R] of a matrix with WIDTH columns as [R, BLOCK]; zeros where masked: what is hidden is never read."""
    columns = tl.arange(0, BLOCK)
    keep = mask[:, None]
    if WIDTH != BLOCK:
        keep = keep & (columns < WIDTH)[None, :]
    tile = tl.load(pointer + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=keep, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(pointer, rows, mask, tile, stride_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write [R, BLOCK] to rows of a matrix with WIDTH contiguous columns."""
    columns = tl.arange(0, BLOCK)
    keep = mask[:, None]
    if WIDTH != BLOCK:
        keep = keep & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * stride_row + columns[None, :], tile.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def segment(ends, head, block, num_blocks, chunks):
    """Bounds of the entries of a block in `pairs`, from the running counts int32 [B * Hq, T * chunks]."""
    last = ends + head.to(tl.int64) * num_blocks * chunks + (block + 1) * chunks - 1
    begin = tl.load(last - chunks, mask=block > 0, other=0)
    return begin, tl.load(last)


@triton.jit
def finite(tile):
    """The tile with zeros in place of NaN and infinities: 0 * NaN would carry a hidden key into visible sums."""
    return tl.where((tile - tile) == 0.0, tile, tl.zeros_like(tile))
