"""Kernels that turn routes around: from the blocks of every query to the queries of every block, without sorting.

A pair is one entry of the routes, numbered row * width + column inside its head. Pairs of a head are counted by
(block, chunk of rows); running counts in that order are where each of them goes, so a block's pairs come out ascending.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["q_len", "k_len", "heads", "width", "num_blocks", "chunks", "chunk_pairs"])
def list_kernel(
    routes, rows, listed, has_own, counts, q_len, k_len, heads, width, num_blocks, chunks, chunk_pairs,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, LIST_OWN: tl.constexpr,
    COUNT: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """listed int32 [B, Hq, Nq, width]: block (number in the batch row) that the pair computes, or -1 for nothing.

    Repeats, blocks that do not exist and those a query cannot see drop out. The own block of a causal query is told by
    has_own int8 [B, Hq, Nq] (zeros before) instead, unless LIST_OWN. COUNT: add to counts [B * Hq, T * chunks].
    """
    head = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < q_len * width
    row, column = pair // width, pair % width
    line = routes + (head.to(tl.int64) * q_len + row) * width
    block = tl.load(line + column, mask=inside, other=-1)
    repeated = tl.zeros([BLOCK], dtype=tl.int1)
    for earlier in range(0, width - 1):
        other = tl.load(line + earlier, mask=inside & (earlier < column), other=-1)
        repeated = repeated | (other == block)
    if HAS_INDEX:
        entry = rows + ((head // heads).to(tl.int64) * q_len + row) * 3
        position = tl.load(entry, mask=inside, other=-1)
        base = tl.load(entry + 1, mask=inside, other=0)
        blocks = tl.load(entry + 2, mask=inside, other=0)
    else:
        position = row + k_len - q_len
        base = tl.zeros_like(row)
        blocks = tl.full([BLOCK], 0, tl.int32) + num_blocks
    kept = inside & (block >= 0) & (block < blocks) & (repeated == 0)
    if CAUSAL:
        own = tl.where(position >= 0, position // BLOCK_SIZE, -1)
        kept = kept & (block <= own)
        if not LIST_OWN:
            tl.store(
                has_own + head.to(tl.int64) * q_len + row, tl.full([BLOCK], 1, tl.int8), mask=kept & (block == own)
            )
            kept = kept & (block < own)
    number = tl.where(kept, base + block, -1)
    tl.store(listed + head.to(tl.int64) * q_len * width + pair, number, mask=inside)
    if COUNT:
        cell = (head.to(tl.int64) * num_blocks + number) * chunks + pair // chunk_pairs
        tl.atomic_add(counts + cell, tl.full([BLOCK], 1, tl.int32), mask=kept)


@triton.jit(do_not_specialize=["total", "num_blocks", "chunks", "chunk_pairs"])
def fill_kernel(listed, cursors, pairs, total, num_blocks, chunks, chunk_pairs, BLOCK: tl.constexpr):
    """pairs int32 [B * Hq, total]: pairs by block, ascending. One program walks a chunk of rows of one head in order.

    cursors int32 [B * Hq, T * chunks]: where the next pair of (block, chunk) goes; moved on.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    line = head.to(tl.int64) * total
    number = tl.arange(0, BLOCK)
    earlier = number[None, :] < number[:, None]
    stop = tl.minimum(total, (chunk + 1) * chunk_pairs)
    for start in range(chunk * chunk_pairs, stop, BLOCK):
        pair = start + number
        block = tl.load(listed + line + pair, mask=pair < stop, other=-1)
        same = (block[:, None] == block[None, :]) & (block >= 0)[:, None]
        rank = tl.sum((same & earlier).to(tl.int32), 1)
        size = tl.sum(same.to(tl.int32), 1)
        # The first pair of a block takes room for all of them.
        leads = (block >= 0) & (rank == 0)
        cell = (head.to(tl.int64) * num_blocks + block) * chunks + chunk
        taken = tl.atomic_add(cursors + cell, size, mask=leads)
        taken = tl.where(leads, taken, 0)
        room = tl.sum(tl.where(same, taken[None, :], 0), 1)
        tl.store(pairs + line + room + rank, pair, mask=block >= 0)
        tl.debug_barrier()  # the next step reads cursors that other threads have moved
