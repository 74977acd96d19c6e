"""Kernels of the routing: block means, and for every query the best blocks without the matrix of all scores."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import block_tokens, load_tile, query_tokens, rows_of

# Scores of half-precision inputs come from tensor cores, with the block mean as a sum of numbers of that precision.
# float16 loses small remainders, so its second number is scaled up by this (a power of two).
HALF_SCALE = tl.constexpr(2048.0)


@triton.jit(do_not_specialize=["k_len", "num_blocks", "programs"])
def centroid_kernel(
    key, means, table, count, k_rows, stride_b, stride_h, stride_n, stride_d, kv_heads, k_len, num_blocks, programs,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, PART_SCALE: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """means [B, Hkv, PARTS, T, D]: mean key of each block, fp32, or PARTS half-precision numbers that sum up to it."""
    head = tl.program_id(1)
    batch = head // kv_heads
    source = key + batch.to(tl.int64) * stride_b + (head % kv_heads).to(tl.int64) * stride_h
    columns = tl.arange(0, BLOCK_D)
    last = num_blocks
    if HAS_INDEX:
        last = tl.load(count + batch)
    for block in range(tl.program_id(0), last, programs):
        first, length = block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE, HAS_INDEX)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, length, BLOCK_N):
            slots = first + start + tl.arange(0, BLOCK_N)
            mask = slots < first + length
            rows = rows_of(slots, k_rows, batch, k_len, mask, HAS_INDEX)
            total += tl.sum(load_tile(source, rows, mask, stride_n, stride_d, HEAD_DIM, BLOCK_D, True), 0)
        rest = total / length.to(tl.float32)
        for part in tl.static_range(PARTS):
            rounded = rest.to(means.dtype.element_ty)
            line = ((head.to(tl.int64) * PARTS + part) * num_blocks + block) * HEAD_DIM
            tl.store(means + line + columns, rounded, mask=columns < HEAD_DIM)
            rest = (rest - rounded.to(tl.float32)) * PART_SCALE


@triton.jit
def _sort_key(score, number):
    """int64 that orders by score, then by number."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | number.to(tl.int64)


@triton.jit
def _tile_scores(
    q, means, numbers, mask, num_blocks, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    PART_SCALE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: q times the means of the blocks `numbers`, in fp32."""
    rows = numbers.to(tl.int64)
    scores = tl.dot(
        q, tl.trans(load_tile(means, rows, mask, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, UPCAST)), input_precision="ieee"
    )
    scale = 1.0
    for _ in tl.static_range(PARTS - 1):
        means += num_blocks.to(tl.int64) * HEAD_DIM
        scale = scale / PART_SCALE
        rest = load_tile(means, rows, mask, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, UPCAST)
        scores += tl.dot(q, tl.trans(rest), input_precision="ieee") * scale
    return scores


@triton.jit(do_not_specialize=["q_len", "k_len", "num_tiles", "num_blocks", "programs", "width", "column", "keep"])
def top_blocks_kernel(
    query, means, routes, bounds, table, count, q_rows, stride_b, stride_h, stride_n, stride_d, heads, group, q_len,
    k_len, num_tiles, num_blocks, programs, width, column, keep,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, PART_SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    OWN: tl.constexpr, BOUNDED: tl.constexpr, STORE_BOUND: tl.constexpr, HAS_INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """routes [B, Hq, Nq, width], columns `column` onwards: the `keep` best blocks, and with OWN the own one.

    The best are kept on chip as sort keys (score, block number), SLOTS >= keep + OWN of them, in no order; the worst is
    replaced as long as a tile of scores holds a better one. bounds int64 [B, Hq, Nq]: with BOUNDED only keys below it
    count; with STORE_BOUND the lowest key that was kept is written to it.
    """
    head = tl.program_id(1)
    batch = head // heads
    source = query + batch.to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    kv_head = batch * (heads // group) + (head % heads) // group
    slot_number = tl.arange(0, SLOTS)
    columns = tl.arange(0, BLOCK_N)
    last = num_tiles
    if HAS_INDEX:
        last = tl.load(count + batch)
    for tile in range(tl.program_id(0), last, programs):
        first, length, position, _, keys = query_tokens(table, batch, tile, num_tiles, q_len, k_len, BLOCK_M, HAS_INDEX)
        offset = tl.arange(0, BLOCK_M)
        live = offset < length
        rows = rows_of(first + offset, q_rows, batch, q_len, live, HAS_INDEX)
        out_rows = head.to(tl.int64) * q_len + rows
        positions = position + offset
        center = means + kv_head.to(tl.int64) * PARTS * num_blocks * HEAD_DIM
        if HAS_INDEX:
            base = tl.load(table + (batch.to(tl.int64) * num_tiles + tile) * 6 + 5)
            center += base.to(tl.int64) * HEAD_DIM
        if CAUSAL:
            own = tl.where(positions >= 0, positions, 0) // BLOCK_SIZE
            candidates = tl.where(live & (positions >= 0), own, 0)
        else:
            own = tl.zeros_like(positions)
            candidates = tl.where(live, (keys + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)

        q = load_tile(source, rows, live, stride_n, stride_d, HEAD_DIM, BLOCK_D, UPCAST)
        # Empty slots have keys below that of any score; slots beyond `keep` are never the lowest.
        empty = tl.where(slot_number < keep, slot_number.to(tl.int64) + (-0x7FFFFFFFFFFFFFFF - 1), 0x7FFFFFFFFFFFFFFF)
        best = tl.broadcast_to(empty[None, :], [BLOCK_M, SLOTS])
        lowest = tl.min(best, 1)
        if BOUNDED:
            bound = tl.load(bounds + out_rows, mask=live, other=-0x7FFFFFFFFFFFFFFF - 1)
        highest = tl.max(candidates, 0)
        if keep == 0:
            highest = 0
        for start in range(0, highest, BLOCK_N):
            numbers = highest - 1 - start - columns  # from the last block to the first
            inside = numbers >= 0
            scores = _tile_scores(q, center, numbers, inside, num_blocks, HEAD_DIM, BLOCK_D, PARTS, PART_SCALE, UPCAST)
            allowed = inside[None, :] & (numbers[None, :] < candidates[:, None])
            if BOUNDED:
                allowed = allowed & (
                    _sort_key(scores, tl.broadcast_to(numbers[None, :], scores.shape)) < bound[:, None]
                )
            scores = tl.where(allowed, scores, float("-inf"))
            top, where = tl.max(scores, 1, return_indices=True)
            challenger = _sort_key(top, highest - 1 - start - where)
            better = (challenger > lowest) & (top > float("-inf"))
            while tl.max(better.to(tl.int32), 0) > 0:
                replaced = better[:, None] & (best == lowest[:, None])
                best = tl.where(replaced, challenger[:, None], best)
                lowest = tl.min(best, 1)
                scores = tl.where(better[:, None] & (columns[None, :] == where[:, None]), float("-inf"), scores)
                top, where = tl.max(scores, 1, return_indices=True)
                challenger = _sort_key(top, highest - 1 - start - where)
                better = (challenger > lowest) & (top > float("-inf"))

        if STORE_BOUND:
            tl.store(bounds + out_rows, lowest, mask=live)
        missing = 0x7FFFFFFF
        found = (best >> 32) > -0x80000000
        chosen = tl.where(found & (slot_number < keep)[None, :], (best & 0x7FFFFFFF).to(tl.int32), missing)
        if OWN:
            sees = live & (positions >= 0)
            chosen = tl.where((slot_number == keep)[None, :] & sees[:, None], own[:, None], chosen)
        chosen = tl.sort(chosen, 1)
        chosen = tl.where(chosen == missing, -1, chosen)
        target = routes + out_rows[:, None] * width + column + slot_number[None, :]
        tl.store(target, chosen, mask=live[:, None] & (slot_number < keep + OWN)[None, :])
