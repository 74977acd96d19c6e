"""Backward kernels of routed attention: keys and values by block, queries by slot or with atomic additions.

Weights are computed again, P = exp2(S * scale * log2(e) - lse * log2(e)); delta = sum(dO * O) - grad_lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import block_tokens, finite, load_tile, query_tokens, rows_of, segment, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    out, grad_out, grad_lse, delta, o_stride_b, o_stride_h, o_stride_n, o_stride_d, g_stride_b, g_stride_h, g_stride_n,
    g_stride_d, l_stride_b, l_stride_h, l_stride_n, heads, q_len,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, Nq] = sum over the head dimension of grad_out * out, minus grad_lse."""
    head = tl.program_id(1)
    batch, own = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows < q_len
    result = load_tile(
        out + batch * o_stride_b + own * o_stride_h, rows, live, o_stride_n, o_stride_d, VALUE_DIM, BLOCK_DV, True
    )
    grad = load_tile(
        grad_out + batch * g_stride_b + own * g_stride_h, rows, live, g_stride_n, g_stride_d, VALUE_DIM, BLOCK_DV, True
    )
    total = tl.sum(result * grad, 1)
    if GRAD_LSE:
        total -= tl.load(grad_lse + batch * l_stride_b + own * l_stride_h + rows * l_stride_n, mask=live, other=0.0)
    tl.store(delta + head.to(tl.int64) * q_len + rows, total, mask=live)


@triton.jit
def _slopes(q, k, v, grad, row_lse, row_delta, seen, scale, PRECISION: tl.constexpr):
    """Weights P and P * (dO V^T - delta) of a tile [BLOCK_M, BLOCK_N], zeros where not seen."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
    slopes = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - row_delta[:, None]
    return weights, tl.where(seen, weights * slopes, 0.0)


@triton.jit(do_not_specialize=["kv_total", "q_len", "k_len", "width", "num_blocks", "chunks", "programs"])
def grad_kv_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, grad_query, pairs, ends, has_own, table, count,
    q_rows, k_rows, q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    kv_total, kv_heads, group, q_len, k_len, width, num_blocks, chunks, programs, scale, scale_log2,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr, ATOMIC: tl.constexpr,
    HAS_INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value [splits, B, Hkv, Nk, D or Dv] of a key tile, over all heads of a group and all rows.

    Program (block and key head, split, tile inside the block): every n-th tile of the rows of every head, in order.
    ATOMIC: the share of listed pairs in the gradient of the query, without the scale, is added to grad_query fp32
    [B, Hq, Nq, D].
    """
    kv_index = tl.program_id(0) % kv_total
    batch, kv_head = kv_index // kv_heads, kv_index % kv_heads
    split, splits = tl.program_id(1), tl.num_programs(1)
    k_source = key + batch.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_source = value + batch.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    target = (split.to(tl.int64) * kv_total + kv_index) * k_len
    columns = tl.arange(0, BLOCK_D)
    spots = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.arange(0, BLOCK_M)
    last = num_blocks
    if HAS_INDEX:
        last = tl.load(count + batch)
    for block in range(tl.program_id(0) // kv_total, last, programs):
        first, length = block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE, HAS_INDEX)
        real = spots < length
        key_rows = rows_of(first + spots, k_rows, batch, k_len, real, HAS_INDEX)
        k = load_tile(k_source, key_rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
        v = load_tile(v_source, key_rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
        dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
        for member in range(0, group):
            own_head = kv_head * group + member
            head = (kv_index * group + member).to(tl.int64)
            q_source = query + batch.to(tl.int64) * q_stride_b + own_head.to(tl.int64) * q_stride_h
            g_source = grad_out + batch.to(tl.int64) * g_stride_b + own_head.to(tl.int64) * g_stride_h
            begin, end = segment(ends, head, block, num_blocks, chunks)
            for start in range(begin + split * BLOCK_M, end, splits * BLOCK_M):
                live = start + offset < end
                pair = tl.load(pairs + head * q_len * width + start + offset, mask=live, other=0)
                rows = (pair // width).to(tl.int64)
                q = load_tile(q_source, rows, live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                grad = load_tile(g_source, rows, live, g_stride_n, g_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                row_lse = tl.load(lse + head * q_len + rows, mask=live, other=0.0) * LOG2_E
                row_delta = tl.load(delta + head * q_len + rows, mask=live, other=0.0)
                seen = live[:, None] & real[None, :]
                weights, slopes = _slopes(q, k, v, grad, row_lse, row_delta, seen, scale_log2, PRECISION)
                dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(slopes.to(q.dtype)), q, dk, input_precision=PRECISION)
                if ATOMIC:
                    dq = tl.dot(slopes.to(k.dtype), k, input_precision=PRECISION)
                    place = grad_query + (head * q_len + rows)[:, None] * HEAD_DIM + columns[None, :]
                    tl.atomic_add(place, dq, mask=live[:, None] & (columns < HEAD_DIM)[None, :], sem="relaxed")
            if OWN:
                before, shift, least = block * BLOCK_SIZE, q_len - k_len, 0
                if HAS_INDEX:
                    entry = table + (batch.to(tl.int64) * num_blocks + block) * 6
                    before, least = tl.load(entry + 2), tl.load(entry + 3)
                    shift = least + tl.load(entry + 4) - tl.load(entry + 5)
                # Query slot s has position s - shift; those of this block that see a key of this tile:
                begin = tl.maximum(before + tl.program_id(2) * BLOCK_N + shift, least)
                end = before + length + shift
                for start in range(begin + split * BLOCK_M, end, splits * BLOCK_M):
                    slots = start + offset
                    live = slots < end
                    rows = rows_of(slots, q_rows, batch, q_len, live, HAS_INDEX)
                    q = load_tile(q_source, rows, live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                    grad = load_tile(g_source, rows, live, g_stride_n, g_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                    row_lse = tl.load(lse + head * q_len + rows, mask=live, other=0.0) * LOG2_E
                    row_delta = tl.load(delta + head * q_len + rows, mask=live, other=0.0)
                    chosen = tl.load(has_own + head * q_len + rows, mask=live, other=0) != 0
                    seen = (live & chosen)[:, None] & (before + spots[None, :] <= (slots - shift)[:, None])
                    seen = seen & real[None, :]
                    weights, slopes = _slopes(q, k, v, grad, row_lse, row_delta, seen, scale_log2, PRECISION)
                    dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, dv, input_precision=PRECISION)
                    dk = tl.dot(tl.trans(slopes.to(q.dtype)), q, dk, input_precision=PRECISION)
        store_tile(grad_key, target + key_rows, real, dk * scale, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_tile(grad_value, target + key_rows, real, dv, VALUE_DIM, VALUE_DIM, BLOCK_DV)


@triton.jit(
    do_not_specialize=["first_head", "chunk_heads", "q_len", "k_len", "width", "num_blocks", "chunks", "programs"]
)
def grad_pair_kernel(
    query, key, value, grad_out, lse, delta, partial, pairs, ends, table, count, k_rows,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    first_head, chunk_heads, heads, group, q_len, k_len, width, num_blocks, chunks, programs, scale_log2,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INDEX: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial fp32 [heads, Nq * width, D]: share of every listed pair in the gradient of its query, not scaled yet."""
    local = tl.program_id(0) % chunk_heads
    head = (first_head + local).to(tl.int64)
    batch, kv_head = head // heads, (head % heads) // group
    q_source = query + batch * q_stride_b + head % heads * q_stride_h
    g_source = grad_out + batch * g_stride_b + head % heads * g_stride_h
    k_source = key + batch * k_stride_b + kv_head * k_stride_h
    v_source = value + batch * v_stride_b + kv_head * v_stride_h
    last = num_blocks
    if HAS_INDEX:
        last = tl.load(count + batch)
    for block in range(tl.program_id(0) // chunk_heads, last, programs):
        begin, end = segment(ends, head, block, num_blocks, chunks)
        first, length = block_tokens(table, batch, block, num_blocks, k_len, BLOCK_SIZE, HAS_INDEX)
        for start in range(begin + tl.program_id(1) * BLOCK_M, end, tl.num_programs(1) * BLOCK_M):
            entry = start + tl.arange(0, BLOCK_M)
            live = entry < end
            pair = tl.load(pairs + head * q_len * width + entry, mask=live, other=0)
            rows = (pair // width).to(tl.int64)
            q = load_tile(q_source, rows, live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
            grad = load_tile(g_source, rows, live, g_stride_n, g_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
            row_lse = tl.load(lse + head * q_len + rows, mask=live, other=0.0) * LOG2_E
            row_delta = tl.load(delta + head * q_len + rows, mask=live, other=0.0)
            dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            for key_start in range(0, length, BLOCK_N):
                spots = key_start + tl.arange(0, BLOCK_N)
                real = spots < length
                key_rows = rows_of(first + spots, k_rows, batch, k_len, real, HAS_INDEX)
                k = load_tile(k_source, key_rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                v = load_tile(v_source, key_rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                seen = live[:, None] & real[None, :]
                _, slopes = _slopes(q, k, v, grad, row_lse, row_delta, seen, scale_log2, PRECISION)
                dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision=PRECISION)
            place = local.to(tl.int64) * q_len * width + pair
            store_tile(partial, place, live, dq, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["first_head", "q_len", "k_len", "width", "num_tiles", "programs"])
def grad_query_kernel(
    query, key, value, grad_out, lse, delta, grad_query, partial, listed, has_own, table, count, q_rows, k_rows,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    first_head, heads, group, q_len, k_len, width, num_tiles, programs, scale, scale_log2,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr, ATOMIC: tl.constexpr,
    HAS_INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query [B, Hq, Nq, D] of query tiles: own blocks, and the sum over listed pairs.

    partial: with ATOMIC that sum, fp32 [B, Hq, Nq, D]; else fp32 [heads, Nq * width, D], added here column by column.
    """
    local = tl.program_id(1)
    head = (first_head + local).to(tl.int64)
    batch, kv_head = head // heads, (head % heads) // group
    q_source = query + batch * q_stride_b + head % heads * q_stride_h
    g_source = grad_out + batch * g_stride_b + head % heads * g_stride_h
    k_source = key + batch * k_stride_b + kv_head * k_stride_h
    v_source = value + batch * v_stride_b + kv_head * v_stride_h
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
        all_rows = head * q_len + rows
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        if OWN:
            positions = position + offset
            chosen = tl.load(has_own + all_rows, mask=live, other=0) != 0
            own = positions // BLOCK_SIZE
            q = load_tile(q_source, rows, live, q_stride_n, q_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
            grad = load_tile(g_source, rows, live, g_stride_n, g_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
            row_lse = tl.load(lse + all_rows, mask=live, other=0.0) * LOG2_E
            row_delta = tl.load(delta + all_rows, mask=live, other=0.0)
            begin = tl.maximum(position, 0) // BLOCK_SIZE * BLOCK_SIZE
            for key_start in range(begin, position + length, BLOCK_N):
                spots = key_start + tl.arange(0, BLOCK_N)
                real = spots < position + length
                key_rows = rows_of(key_first + spots, k_rows, batch, k_len, real, HAS_INDEX)
                k = load_tile(k_source, key_rows, real, k_stride_n, k_stride_d, HEAD_DIM, BLOCK_D, UPCAST)
                v = load_tile(v_source, key_rows, real, v_stride_n, v_stride_d, VALUE_DIM, BLOCK_DV, UPCAST)
                seen = (spots[None, :] <= positions[:, None]) & ((spots // BLOCK_SIZE)[None, :] == own[:, None])
                seen = seen & chosen[:, None]
                _, slopes = _slopes(q, k, v, grad, row_lse, row_delta, seen, scale_log2, PRECISION)
                dq = tl.dot(slopes.to(k.dtype), finite(k), dq, input_precision=PRECISION)
        if ATOMIC:
            dq += load_tile(partial, all_rows, live, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, False)
        else:
            for column in range(0, width):
                pair = rows * width + column
                block = tl.load(listed + head * q_len * width + pair, mask=live, other=-1)
                place = local.to(tl.int64) * q_len * width + pair
                dq += load_tile(partial, place, block >= 0, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, False)
        store_tile(grad_query, all_rows, live, dq * scale, HEAD_DIM, HEAD_DIM, BLOCK_D)
