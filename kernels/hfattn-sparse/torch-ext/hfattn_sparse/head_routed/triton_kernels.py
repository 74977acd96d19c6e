"""The kernels of head-routed attention: tiles of rows that chose a head, each row with its own range of keys.

In all kernels `rows`, `low`, `high` are int32 [B, H, q_len] and `count` int32 [B, H] (see `triton_path.RowLists`);
out, grad_out, lse and delta are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import LN2, LOG2E, NEG_INF, load_rows, places, store_rows


@triton.jit
def _listed(rows, low, high, at, tile, count, BLOCK_M: tl.constexpr):
    """Tensor rows, key ranges and validity of one tile of a list that starts at `at`."""
    spot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = spot < count
    row = tl.load(rows + at + spot, mask=real, other=0).to(tl.int64)
    begin = tl.load(low + at + spot, mask=real, other=0)
    end = tl.load(high + at + spot, mask=real, other=0)
    return row, begin, end, real


@triton.jit
def _limits(begin, end, real):
    """First and last-but-one key slot that some row of a tile sees."""
    first = tl.min(tl.where(real, begin, 2147483647), 0)
    return first, tl.max(tl.where(real, end, 0), 0)


@triton.jit
def _whole(first, begin, end, real, BLOCK_N: tl.constexpr):
    """Where the tiles of keys begin and end that every row of the tile sees whole, counted from `first`."""
    low = tl.max(tl.where(real, begin, 0), 0)
    high = tl.min(tl.where(real, end, 2147483647), 0)
    start = first + (low - first + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return start, start + tl.maximum(high - start, 0) // BLOCK_N * BLOCK_N


@triton.jit
def _attend(
    acc, total, top, query, k, v, k_rows, batch, k_len, k_sn, k_sd, v_sn, v_sd, start, stop, begin, end, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the keys start to stop to acc, total and top of an online softmax; without MASKED all rows see them all."""
    for tile in range(start, stop, BLOCK_N):
        slot = tile + tl.arange(0, BLOCK_N)
        inside = slot < stop
        place = places(k_rows, batch, k_len, slot, inside).to(tl.int64)
        keys = load_rows(k, place * k_sn, k_sd, inside, D, WIDTH, MASKED, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        if MASKED:
            seen = (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])
            scores = tl.where(seen, scores, NEG_INF)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        values = load_rows(v, place * v_sn, v_sd, inside, DV, WIDTH_V, MASKED, UPCAST)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["q_len", "k_len"])
def forward_kernel(
    q, k, v, out, lse, rows, low, high, counts, k_rows,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, group, q_len, k_len, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads, B): an online softmax over the keys of a tile of rows. scale includes log2(e)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_at = batch.to(tl.int64) * tl.num_programs(1) + head
    count = tl.load(counts + list_at)
    if tile * BLOCK_M < count:
        k += batch.to(tl.int64) * k_sb + (head // group).to(tl.int64) * k_sh
        v += batch.to(tl.int64) * v_sb + (head // group).to(tl.int64) * v_sh
        row, begin, end, real = _listed(rows, low, high, list_at * q_len, tile, count, BLOCK_M)
        first, last = _limits(begin, end, real)
        at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + row * q_sn
        query = load_rows(q, at, q_sd, real, D, WIDTH, True, UPCAST)
        acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], NEG_INF, tl.float32)
        whole, rest = _whole(first, begin, end, real, BLOCK_N)
        acc, total, top = _attend(
            acc, total, top, query, k, v, k_rows, batch, k_len, k_sn, k_sd, v_sn, v_sd,
            first, tl.minimum(whole, last), begin, end, scale,
            D, DV, WIDTH, WIDTH_V, BLOCK_N, True, PRECISION, UPCAST,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, query, k, v, k_rows, batch, k_len, k_sn, k_sd, v_sn, v_sd,
            whole, rest, begin, end, scale,
            D, DV, WIDTH, WIDTH_V, BLOCK_N, False, PRECISION, UPCAST,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, query, k, v, k_rows, batch, k_len, k_sn, k_sd, v_sn, v_sd,
            rest, last, begin, end, scale,
            D, DV, WIDTH, WIDTH_V, BLOCK_N, True, PRECISION, UPCAST,
        )  # fmt: skip
        safe = tl.where(total == 0.0, 1.0, total)
        into = list_at * q_len + row
        store_rows(out, into * DV, acc / safe[:, None], real, DV, WIDTH_V)
        tl.store(lse + into, tl.where(total == 0.0, NEG_INF, (top + tl.log2(safe)) * LN2), mask=real)


@triton.jit
def _slopes(query, keys, grad, values, sums, delta, seen, scale, PRECISION: tl.constexpr):
    """Weights and gradients of the scaled scores, both [M, N]."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    weights = tl.exp2(tl.where(seen, scores - sums[:, None], NEG_INF) * LOG2E)
    slope = tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None]
    return weights, tl.where(seen, weights * slope, 0.0) * scale


@triton.jit(do_not_specialize=["q_len", "k_len"])
def queries_kernel(
    q, k, v, grad_out, lse, delta, grad_q, rows, low, high, counts, k_rows,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, group, q_len, k_len, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads, B): gradients of the queries of a tile of rows, into contiguous grad_q."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_at = batch.to(tl.int64) * tl.num_programs(1) + head
    count = tl.load(counts + list_at)
    if tile * BLOCK_M < count:
        k += batch.to(tl.int64) * k_sb + (head // group).to(tl.int64) * k_sh
        v += batch.to(tl.int64) * v_sb + (head // group).to(tl.int64) * v_sh
        row, begin, end, real = _listed(rows, low, high, list_at * q_len, tile, count, BLOCK_M)
        first, last = _limits(begin, end, real)
        at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + row * q_sn
        into = list_at * q_len + row
        query = load_rows(q, at, q_sd, real, D, WIDTH, True, UPCAST)
        grad = load_rows(grad_out, into * DV, 1, real, DV, WIDTH_V, True, UPCAST)
        sums = tl.load(lse + into, mask=real, other=0.0)
        slack = tl.load(delta + into, mask=real, other=0.0)
        acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for start in range(first, last, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            inside = slot < last
            place = places(k_rows, batch, k_len, slot, inside).to(tl.int64)
            keys = load_rows(k, place * k_sn, k_sd, inside, D, WIDTH, True, UPCAST)
            values = load_rows(v, place * v_sn, v_sd, inside, DV, WIDTH_V, True, UPCAST)
            seen = (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])
            _, slope = _slopes(query, keys, grad, values, sums, slack, seen, scale, PRECISION)
            acc = tl.dot(slope.to(keys.dtype), keys, acc, input_precision=PRECISION)
        store_rows(grad_q, into * D, acc, real, D, WIDTH)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def keys_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, rows, low, high, counts, k_rows,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, group, q_len, k_len, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, KV heads, B): gradients of keys and values from all listed rows of the group's heads.

    One program writes a key tile, so nothing is added atomically. grad_k and grad_v are contiguous.
    """
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_at = batch.to(tl.int64) * tl.num_programs(1) + kv_head
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = slot < k_len
    place = places(k_rows, batch, k_len, slot, inside).to(tl.int64)
    k_at = batch.to(tl.int64) * k_sb + kv_head.to(tl.int64) * k_sh
    v_at = batch.to(tl.int64) * v_sb + kv_head.to(tl.int64) * v_sh
    keys = load_rows(k, k_at + place * k_sn, k_sd, inside, D, WIDTH, True, UPCAST)
    values = load_rows(v, v_at + place * v_sn, v_sd, inside, DV, WIDTH_V, True, UPCAST)
    acc_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    acc_v = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    for member in range(0, group):
        list_at = kv_at * group + member
        head = kv_head * group + member
        count = tl.load(counts + list_at)
        for part in range(0, (count + BLOCK_M - 1) // BLOCK_M):
            row, begin, end, real = _listed(rows, low, high, list_at * q_len, part, count, BLOCK_M)
            first, last = _limits(begin, end, real)
            if (first < (tile + 1) * BLOCK_N) & (last > tile * BLOCK_N):
                at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + row * q_sn
                into = list_at * q_len + row
                query = load_rows(q, at, q_sd, real, D, WIDTH, True, UPCAST)
                grad = load_rows(grad_out, into * DV, 1, real, DV, WIDTH_V, True, UPCAST)
                sums = tl.load(lse + into, mask=real, other=0.0)
                slack = tl.load(delta + into, mask=real, other=0.0)
                seen = (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])
                weights, slope = _slopes(query, keys, grad, values, sums, slack, seen, scale, PRECISION)
                acc_v = tl.dot(tl.trans(weights).to(grad.dtype), grad, acc_v, input_precision=PRECISION)
                acc_k = tl.dot(tl.trans(slope).to(query.dtype), query, acc_k, input_precision=PRECISION)
    target = kv_at * k_len + place
    store_rows(grad_k, target * D, acc_k, inside, D, WIDTH)
    store_rows(grad_v, target * DV, acc_v, inside, DV, WIDTH_V)
