"""Forward kernels of routed attention: partial results of listed pairs by key block, then one merge by query.

Scores are kept in base 2 throughout: exp2(score * scale * log2(e) - lse2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import block_tokens, finite, load_tile, query_tokens, rows_of, segment, store_tile

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _soften(scores, top, total):
    """One step of the online softmax, base 2: weights, factor for what there is, new maximum and sum."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(top - shift)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit(
    do_not_specialize=["first_head", "chunk_heads", "q_len", "k_len", "width", "num_blocks", "chunks", "programs"]
)
def partial_kernel(
    query, key, value, partial, partial_lse, pairs, ends, table, count, k_rows,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, first_head, chunk_heads, heads, group, q_len, k_len, width,
    num_blocks, chunks, programs, scale,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INDEX: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of every listed pair over the keys of its block: partial [heads, Nq * width, Dv] and its lse, base 2.

    Program (block and head, split): takes every n-th tile of the rows that chose the block. Heads run fastest, so that
    the first blocks, which most rows may choose, start first.
    """
    local = tl.program_id(0) % chunk_heads
    head = first_head + local
    batch, kv_head = head // heads, (head % heads) // group
    q_source = query + batch.to(tl.int64) * q_stride_b + (head % heads).to(tl.int64) * q_stride_h
    k_source = key + batch.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_source = value + batch.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    listed = pairs + head.to(tl.int64) * q_len * width
    line = local.to(tl.int64) * q_len * width
    last = num_blocks
    if HAS_INDEX:
        last = tl.load(count + batch)
    for block in range(tl.program_id(0) // chunk_heads, last, programs):
        begin, end = segment(ends, head, block, num_blocks, chunks)
        first, length = block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE, HAS_INDEX)
        # A block of one tile is read once for all rows.
        slots = tl.arange(0, BLOCK_N)
        real = slots < length
        rows = rows_of(first + slots, k_rows, batch, k_len, real, HAS_INDEX)
        if BLOCK_SIZE <= BLOCK_N:
            k = load_tile(k_source, rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
            v = load_tile(v_source, rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
        for start in range(begin + tl.program_id(1) * BLOCK_M, end, tl.num_programs(1) * BLOCK_M):
            entry = start + tl.arange(0, BLOCK_M)
            live = entry < end
            pair = tl.load(listed + entry, mask=live, other=0)
            q = load_tile(
                q_source, (pair // width).to(tl.int64), live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST
            )
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
            if BLOCK_SIZE <= BLOCK_N:
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                scores = tl.where(real[None, :], scores, float("-inf"))
                weights, factor, top, total = _soften(scores, top, total)
                acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            else:
                for key_start in range(0, length, BLOCK_N):
                    real = key_start + slots < length
                    rows = rows_of(first + key_start + slots, k_rows, batch, k_len, real, HAS_INDEX)
                    k = load_tile(k_source, rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                    v = load_tile(v_source, rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                    scores = tl.where(real[None, :], scores, float("-inf"))
                    weights, factor, top, total = _soften(scores, top, total)
                    acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
            target = line + pair
            store_tile(partial, target, live, acc / total[:, None], VALUE_DIM, VALUE_DIM, BLOCK_DV)
            tl.store(partial_lse + target, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["first_head", "q_len", "k_len", "width", "num_blocks"])
def pair_kernel(
    query, key, value, partial, partial_lse, listed, rows_table, table, k_rows,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, first_head, heads, group, q_len, k_len, width, num_blocks, scale,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """`partial_kernel` for a handful of rows (decoding): one program a pair, which may be of the own block here."""
    local = tl.program_id(1)
    head, pair = first_head + local, tl.program_id(0)
    batch, kv_head = head // heads, (head % heads) // group
    block = tl.load(listed + head.to(tl.int64) * q_len * width + pair)
    if block >= 0:
        row = pair // width
        q_source = query + batch.to(tl.int64) * q_stride_b + (head % heads).to(tl.int64) * q_stride_h
        k_source = key + batch.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        v_source = value + batch.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
        first, length = block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE, HAS_INDEX)
        if CAUSAL:
            if HAS_INDEX:
                position = tl.load(rows_table + (batch.to(tl.int64) * q_len + row) * 3)
                before = tl.load(table + (batch.to(tl.int64) * num_blocks + block) * 6 + 2)
            else:
                position, before = row + k_len - q_len, block * BLOCK_SIZE
            length = tl.minimum(length, position - before + 1)
        columns = tl.arange(0, BLOCK_D)
        q = tl.load(
            q_source + row.to(tl.int64) * q_stride_n + columns * q_stride_d, mask=columns < HEAD_DIM, other=0.0
        ).to(tl.float32)
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], dtype=tl.float32)
        acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
        for start in range(0, length, BLOCK_N):
            slots = start + tl.arange(0, BLOCK_N)
            real = slots < length
            rows = rows_of(first + slots, k_rows, batch, k_len, real, HAS_INDEX)
            k = load_tile(k_source, rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, True)
            v = load_tile(v_source, rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, True)
            scores = tl.where(real, tl.sum(k * q[None, :], 1) * scale, float("-inf"))
            weights, factor, top, total = _soften(scores[None, :], top, total)
            acc = acc * factor + tl.sum(tl.reshape(weights, [BLOCK_N, 1]) * v, 0)
        target = local.to(tl.int64) * q_len * width + pair
        store_tile(partial, target + tl.arange(0, 1), tl.full([1], 1, tl.int1), (acc / total)[None, :], VALUE_DIM,
                   VALUE_DIM, BLOCK_DV)  # fmt: skip
        tl.store(partial_lse + target + tl.arange(0, 1), top + tl.log2(total))


@triton.jit(do_not_specialize=["first_head", "q_len", "k_len", "width", "num_tiles", "programs"])
def merge_kernel(
    query, key, value, out, lse, partial, partial_lse, listed, has_own, table, count, q_rows, k_rows,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, first_head, heads, group, q_len, k_len, width,
    num_tiles, programs, scale,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr, HAS_INDEX: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, Nq, Dv] and lse [B, Hq, Nq] (natural logarithm) of query tiles.

    With OWN the causal part inside own blocks is computed here; then the partial results of all columns follow.
    """
    local = tl.program_id(1)
    head = first_head + local
    batch, kv_head = head // heads, (head % heads) // group
    q_source = query + batch.to(tl.int64) * q_stride_b + (head % heads).to(tl.int64) * q_stride_h
    k_source = key + batch.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_source = value + batch.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    last = num_tiles
    if HAS_INDEX:
        last = tl.load(count + batch)
    for tile in range(tl.program_id(0), last, programs):
        first, length, position, key_first, keys = query_tokens(
            table, batch, tile, num_tiles, q_len, k_len, BLOCK_M, HAS_INDEX
        )
        offset = tl.arange(0, BLOCK_M)
        live = offset < length
        rows = rows_of(first + offset, q_rows, batch, q_len, live, HAS_INDEX)
        out_rows = head.to(tl.int64) * q_len + rows
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        if OWN:
            positions = position + offset
            chosen = tl.load(has_own + out_rows, mask=live, other=0) != 0
            own = positions // BLOCK_SIZE
            q = load_tile(q_source, rows, live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
            start = tl.maximum(position, 0) // BLOCK_SIZE * BLOCK_SIZE
            for key_start in range(start, position + length, BLOCK_N):
                spots = key_start + tl.arange(0, BLOCK_N)
                real = spots < position + length
                key_rows = rows_of(key_first + spots, k_rows, batch, k_len, real, HAS_INDEX)
                k = load_tile(k_source, key_rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                v = load_tile(v_source, key_rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                seen = (spots[None, :] <= positions[:, None]) & ((spots // BLOCK_SIZE)[None, :] == own[:, None])
                seen = seen & chosen[:, None]
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                scores = tl.where(seen, scores, float("-inf"))
                weights, factor, top, total = _soften(scores, top, total)
                acc = tl.dot(weights.to(v.dtype), finite(v), acc * factor[:, None], input_precision=PRECISION)
                # Only rows that see a value which is not finite may suffer from it.
                broken = tl.max(((v - v) != 0.0).to(tl.int32), 1)
                hit = tl.max(tl.where(seen, broken[None, :], 0), 1) > 0
                acc = tl.where(hit[:, None], float("nan"), acc)
        for column in range(0, width):
            pair = rows * width + column
            block = tl.load(listed + head.to(tl.int64) * q_len * width + pair, mask=live, other=-1)
            there = block >= 0
            place = local.to(tl.int64) * q_len * width + pair
            part_lse = tl.load(partial_lse + place, mask=there, other=float("-inf"))
            part = load_tile(partial, place, there, VALUE_DIM, 1, VALUE_DIM, BLOCK_DV, True)
            new_top = tl.maximum(top, part_lse)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            factor, weight = tl.exp2(top - shift), tl.exp2(part_lse - shift)
            acc = acc * factor[:, None] + part * weight[:, None]
            total, top = total * factor + weight, new_top
        blind = total == 0.0
        total = tl.where(blind, 1.0, total)
        store_tile(out, out_rows, live, acc / total[:, None], VALUE_DIM, VALUE_DIM, BLOCK_DV)
        tl.store(lse + out_rows, tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN_2), mask=live)
