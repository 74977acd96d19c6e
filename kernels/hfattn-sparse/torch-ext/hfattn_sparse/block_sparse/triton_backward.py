"""Backward kernels of block-sparse attention: query tiles sum dq, key tiles sum dk, dv and the gradient of the bias.

p = exp(s - lse), ds = p * (do v^T - delta) with delta = sum(do * out) - dlse; dq = scale ds k, dk = scale ds^T q,
dv = p^T do, dbias = sum of ds over queries (FlashAttention-2, arXiv 2307.08691, algorithm 2, without its atomic sums).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    LN2,
    LOG2E,
    NEG_INF,
    count_below,
    describe,
    finite,
    key_tiles,
    list_of,
    listed_tokens,
    load_bias,
    load_rows,
    places,
    query_rows,
    store_rows,
)


@triton.jit
def _sum_keys(
    acc, query, grad, level, delta, position, k, v, bias, ids, k_rows, batch, begin, end, listed, k_first, k_length,
    k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add ds k of tiles begin to end of the listed keys to acc [M, WIDTH]; MASKED and CAREFUL as in the forward."""
    for tile in tl.range(begin, end, num_stages=1 if CAREFUL else None):
        key = listed_tokens(ids, tile, listed, block_k, k_length, BLOCK_N, EVEN)
        real = key < k_length
        place = places(k_rows, batch, k_len, k_first + key, real)
        if bias is not None:
            shift, real = load_bias(bias, place, real)
        place = place.to(tl.int64)
        keys = load_rows(k, place * k_sn, k_sd, real, D, WIDTH, MASKED, UPCAST)
        values = load_rows(v, place * v_sn, v_sd, real, DV, WIDTH_V, MASKED, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        steps = tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None]
        if MASKED:
            visible = real[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= position[:, None])
            if bias is not None:
                scores += shift[None, :]
            steps = tl.where(visible, tl.exp2(scores - level[:, None]) * steps, 0.0)
        else:
            steps = tl.exp2(scores - level[:, None]) * steps
        if CAREFUL:  # rows that see a broken key are NaN already, through its score
            keys = tl.where(finite(keys), keys, 0.0).to(keys.dtype)
        acc = tl.dot(steps.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["q_len", "k_len", "q_blocks", "list_rows", "list_len", "programs", "subs"])
def queries_kernel(
    q, k, v, lists, bias, out, lse, grad_out, grad_lse, dq, delta, q_rows, k_rows, count, tiles,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, g_sb, g_sh, g_sn, g_sd, bias_sb, bias_sh,
    q_len, k_len, q_heads, group, block_q, block_k, q_blocks, list_rows, list_heads, list_len, list_share, bias_share,
    programs, subs, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr, PER_SEQUENCE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the keys kernel. Grid (programs * subs, heads / FOLD, B).

    out, dq [B, q_heads, q_len, .] and lse, grad_lse, delta [B, q_heads, q_len] are contiguous; the rest as in the
    forward.
    """
    head = tl.program_id(1) * FOLD
    batch = tl.program_id(2)
    sub = tl.program_id(0) % subs
    program = tl.program_id(0) // subs
    k += batch.to(tl.int64) * k_sb + (head // group).to(tl.int64) * k_sh
    v += batch.to(tl.int64) * v_sb + (head // group).to(tl.int64) * v_sh
    if bias is not None:
        bias += batch.to(tl.int64) * bias_sb + (head // bias_share).to(tl.int64) * bias_sh

    first, end, step = 0, 1, 1
    if tiles is not None:
        first, end, step = program, tl.load(count + batch), programs
    for turn in range(first, end, step):
        tile = turn
        if tiles is None:
            tile = program
            if CAUSAL:
                tile = programs - 1 - program
        block, number, q_first, q_length, k_first, k_length = describe(tiles, batch, tile, q_len, q_len, k_len)
        row, member, real, low, high = query_rows(block, sub, q_length, block_q, FOLD, BLOCK_M)
        place = places(q_rows, batch, q_len, q_first + row, real).to(tl.int64)
        q_at = batch.to(tl.int64) * q_sb + (head + member).to(tl.int64) * q_sh + place * q_sn
        g_at = batch.to(tl.int64) * g_sb + (head + member).to(tl.int64) * g_sh + place * g_sn
        at = (batch.to(tl.int64) * q_heads + head + member) * q_len + place
        query = load_rows(q, q_at, q_sd, real, D, WIDTH, True, UPCAST)
        grad = load_rows(grad_out, g_at, g_sd, real, DV, WIDTH_V, True, UPCAST)
        result = load_rows(out, at * DV, 1, real, DV, WIDTH_V, True, UPCAST)
        difference = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
        if grad_lse is not None:
            difference -= tl.load(grad_lse + at, mask=real, other=0.0)
        tl.store(delta + at, difference, mask=real)
        # exp2(s - inf) = 0: rows that see nothing have no gradient.
        level = tl.load(lse + at, mask=real, other=NEG_INF) * LOG2E
        level = tl.where(level == NEG_INF, float("inf"), level)

        ids = list_of(
            lists, batch, number, head, block, list_rows, list_heads, q_blocks, list_len, list_share, PER_SEQUENCE
        )
        offset = k_length - q_length
        whole, tiles_k, listed = key_tiles(
            ids, list_len, low + offset, high + offset, k_length, block_k, BLOCK_N, CAUSAL
        )
        if bias is not None:
            whole = 0
        acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        if bias is None:
            acc = _sum_keys(
                acc, query, grad, level, difference, row + offset, k, v, bias, ids, k_rows, batch, 0, whole, listed,
                k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, EVEN,
                CAUSAL, False, False, PRECISION, UPCAST,
            )  # fmt: skip
        acc = _sum_keys(
            acc, query, grad, level, difference, row + offset, k, v, bias, ids, k_rows, batch, whole, tiles_k, listed,
            k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, EVEN,
            CAUSAL, True, False, PRECISION, UPCAST,
        )  # fmt: skip
        if CAUSAL:
            spoilt = tl.max(tl.max((finite(acc) == 0).to(tl.int32), 1), 0)
            if spoilt > 0:
                acc = _sum_keys(
                    tl.zeros([BLOCK_M, WIDTH], tl.float32), query, grad, level, difference, row + offset, k, v, bias,
                    ids, k_rows, batch, 0, tiles_k, listed, k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k,
                    scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, EVEN, CAUSAL, True, True, PRECISION, UPCAST,
                )  # fmt: skip
        store_rows(dq, at * D, acc * (scale * LN2), real, D, WIDTH)


@triton.jit
def _reading_tiles(ids, length, low, high, q_length, offset, block_q, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """How the rows of the query blocks at `ids` fall into tiles of BLOCK_M, for keys at positions low to high.

    Returns the first tile with a row that sees a key, the first from which on all rows see all keys, the end, and the
    number of query blocks that the sequence has.
    """
    listed = count_below(ids, length, (q_length + block_q - 1) // block_q)
    last = tl.load(ids + listed - 1, mask=listed > 0, other=0)
    rows = tl.where(listed > 0, (listed - 1) * block_q + tl.minimum(q_length - last * block_q, block_q), 0)
    end = (rows + BLOCK_M - 1) // BLOCK_M
    begin, middle = 0, 0
    if CAUSAL:
        sees_one = tl.maximum(low - offset, 0)
        sees_all = tl.maximum(high - offset, 0)
        hidden = tl.minimum(count_below(ids, length, sees_one // block_q), listed)
        part = tl.minimum(count_below(ids, length, (sees_all + block_q - 1) // block_q), listed)
        border = tl.load(ids + hidden, mask=hidden < listed, other=0)
        inside = tl.where(hidden < listed, tl.maximum(sees_one - border * block_q, 0), 0)
        begin = tl.minimum((hidden * block_q + inside) // BLOCK_M, end)
        border = tl.load(ids + part - 1, mask=part > 0, other=0)
        inside = tl.where(part > 0, tl.maximum((border + 1) * block_q - sees_all, 0), 0)
        middle = tl.minimum(tl.maximum((part * block_q - inside + BLOCK_M - 1) // BLOCK_M, begin), end)
    return begin, middle, end, listed


@triton.jit
def _sum_queries(
    dk, dv, db, keys, values, bias, shift, shown, key, q, grad_out, lse, delta, ids, q_rows, batch, begin, end, listed,
    q_first, q_length, offset, q_sn, q_sd, g_sn, g_sd, q_len, block_q, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add tiles begin to end of the reading queries to dk [N, WIDTH], dv [N, WIDTH_V] and db [N]."""
    for tile in tl.range(begin, end, num_stages=1 if CAREFUL else None):
        row = listed_tokens(ids, tile, listed, block_q, q_length, BLOCK_M, EVEN)
        real = row < q_length
        place = places(q_rows, batch, q_len, q_first + row, real).to(tl.int64)
        query = load_rows(q, place * q_sn, q_sd, real, D, WIDTH, True, UPCAST)
        grad = load_rows(grad_out, place * g_sn, g_sd, real, DV, WIDTH_V, True, UPCAST)
        level = tl.load(lse + place, mask=real, other=NEG_INF) * LOG2E
        level = tl.where(level == NEG_INF, float("inf"), level)
        difference = tl.load(delta + place, mask=real, other=0.0)
        scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * scale
        steps = tl.dot(values, tl.trans(grad), input_precision=PRECISION) - difference[None, :]
        if bias is not None:
            scores += shift[:, None]
        if MASKED:
            visible = shown[:, None]
            if CAUSAL:
                visible = visible & (key[:, None] <= (row + offset)[None, :])
            weights = tl.where(visible, tl.exp2(scores - level[None, :]), 0.0)
            steps = tl.where(visible, weights * steps, 0.0)
        else:
            weights = tl.exp2(scores - level[None, :])
            steps = weights * steps
        if CAREFUL:  # keys that a broken query sees are NaN already, through its score
            good = finite(grad)
            broken = tl.max((good == 0).to(tl.int32), 1) > 0
            grad = tl.where(good, grad, 0.0).to(grad.dtype)
            query = tl.where(finite(query), query, 0.0).to(query.dtype)
            weights = tl.where(visible & broken[None, :], float("nan"), weights)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(steps.to(query.dtype), query, dk, input_precision=PRECISION)
        if bias is not None:
            db += tl.sum(steps, 1)
    return dk, dv, db


@triton.jit
def _sum_group(
    keys, values, key, real, low, high, place, q, grad_out, lse, delta, bias, dbias, entries, starts, q_rows,
    batch, kv_head, block, q_first, q_length, offset, q_sh, q_sn, q_sd, g_sh, g_sn, g_sd, bias_sh, q_len, k_len, group,
    block_q, entry_len, k_blocks, list_share, bias_share, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr, BIAS_PER_HEAD: tl.constexpr,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient of the bias over all query heads that share the keys; the latter is stored here if each
    of these heads has its own."""
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        listing = (head // list_share).to(tl.int64)
        start = tl.load(starts + listing * (k_blocks + 1) + block)
        length = tl.load(starts + listing * (k_blocks + 1) + block + 1) - start
        ids = entries + listing * entry_len + start
        begin, middle, end, listed = _reading_tiles(ids, length, low, high, q_length, offset, block_q, BLOCK_M, CAUSAL)
        shift, shown = tl.zeros([BLOCK_N], tl.float32), real
        if bias is not None:
            shift, shown = load_bias(bias + (head // bias_share).to(tl.int64) * bias_sh, place, real)
            middle = end
        if CAREFUL:
            middle = end
        head_q = q + head.to(tl.int64) * q_sh
        head_g = grad_out + head.to(tl.int64) * g_sh
        stats = head.to(tl.int64) * q_len
        if CAUSAL or CAREFUL or bias is not None:
            dk, dv, db = _sum_queries(
                dk, dv, db, keys, values, bias, shift, shown, key, head_q, head_g, lse + stats, delta + stats, ids,
                q_rows, batch, begin, middle, listed, q_first, q_length, offset, q_sn, q_sd, g_sn, g_sd, q_len, block_q,
                scale, D, DV, WIDTH, WIDTH_V, BLOCK_M, EVEN, CAUSAL, True, CAREFUL, PRECISION, UPCAST,
            )  # fmt: skip
        if bias is None and not CAREFUL:
            dk, dv, db = _sum_queries(
                dk, dv, db, keys, values, bias, shift, shown, key, head_q, head_g, lse + stats, delta + stats, ids,
                q_rows, batch, middle, end, listed, q_first, q_length, offset, q_sn, q_sd, g_sn, g_sd, q_len, block_q,
                scale, D, DV, WIDTH, WIDTH_V, BLOCK_M, EVEN, CAUSAL, False, False, PRECISION, UPCAST,
            )  # fmt: skip
        if BIAS_PER_HEAD:
            tl.store(dbias + head.to(tl.int64) * k_len + place, db, mask=real)
            db = tl.zeros([BLOCK_N], tl.float32)
    return dk, dv, db


@triton.jit(do_not_specialize=["q_len", "k_len", "k_blocks", "list_rows", "entry_len", "programs", "subs"])
def keys_kernel(
    q, k, v, entries, starts, bias, lse, delta, grad_out, dk, dv, dbias, q_rows, k_rows, count, tiles,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, g_sb, g_sh, g_sn, g_sd, bias_sb, bias_sh,
    q_len, k_len, kv_heads, group, block_q, block_k, k_blocks, list_rows, list_heads, entry_len, list_share, bias_share,
    programs, subs, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr, PER_SEQUENCE: tl.constexpr,
    BIAS_PER_HEAD: tl.constexpr, REPAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv, dbias. Grid (programs * subs, kv_heads, B).

    entries, starts: `triton_lists.readers`. dk, dv [B, kv_heads, k_len, .] and dbias [B, kv_heads, k_len] (with
    BIAS_PER_HEAD [B, kv_heads * group, k_len]) are contiguous. tiles: of keys. The rest as in the forward.

    0 * NaN: a query that does not see some keys may spoil their sums. It is rare and avoiding it takes registers, so a
    second launch with REPAIR finds such tiles and computes them again.
    """
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    sub = tl.program_id(0) % subs
    program = tl.program_id(0) // subs
    wide = batch.to(tl.int64)
    q += wide * q_sb
    grad_out += wide * g_sb
    k += wide * k_sb + kv_head.to(tl.int64) * k_sh
    v += wide * v_sb + kv_head.to(tl.int64) * v_sh
    lse += wide * kv_heads * group * q_len
    delta += wide * kv_heads * group * q_len
    if bias is not None:
        bias += wide * bias_sb
        dbias += wide * kv_heads * k_len * (group if BIAS_PER_HEAD else 1)

    first, end, step = 0, 1, 1
    if tiles is not None:
        first, end, step = program, tl.load(count + batch), programs
    for turn in range(first, end, step):
        tile = turn
        if tiles is None:
            tile = program
        block, number, q_first, q_length, k_first, k_length = describe(tiles, batch, tile, k_len, q_len, k_len)
        low = block * block_k + sub * BLOCK_N
        high = tl.minimum(tl.minimum(low + BLOCK_N, (block + 1) * block_k), k_length) - 1
        key = low + tl.arange(0, BLOCK_N)
        real = key <= high
        place = places(k_rows, batch, k_len, k_first + key, real)
        keys = load_rows(k, place.to(tl.int64) * k_sn, k_sd, real, D, WIDTH, True, UPCAST)
        values = load_rows(v, place.to(tl.int64) * v_sn, v_sd, real, DV, WIDTH_V, True, UPCAST)
        list_row = batch
        if PER_SEQUENCE:
            list_row = number
        list_row = tl.minimum(list_row, list_rows - 1).to(tl.int64) * list_heads
        own_entries = entries + list_row * entry_len
        own_starts = starts + list_row * (k_blocks + 1)
        offset = k_length - q_length
        at = (wide * kv_heads + kv_head) * k_len + place
        wanted = True
        if REPAIR:
            found_k = load_rows(dk, at * D, 1, real, D, WIDTH, True, False)
            found_v = load_rows(dv, at * DV, 1, real, DV, WIDTH_V, True, False)
            spoilt = tl.max(tl.max((finite(found_k) == 0).to(tl.int32), 1), 0)
            wanted = spoilt + tl.max(tl.max((finite(found_v) == 0).to(tl.int32), 1), 0) > 0
        if wanted:
            grad_k, grad_v, grad_b = _sum_group(
                keys, values, key, real, low, high, place, q, grad_out, lse, delta, bias, dbias, own_entries,
                own_starts, q_rows, batch, kv_head, block, q_first, q_length, offset, q_sh, q_sn, q_sd, g_sh, g_sn,
                g_sd, bias_sh, q_len, k_len, group, block_q, entry_len, k_blocks, list_share, bias_share, scale, D, DV,
                WIDTH, WIDTH_V, BLOCK_M, BLOCK_N, EVEN, CAUSAL, BIAS_PER_HEAD, REPAIR, PRECISION, UPCAST,
            )  # fmt: skip
            store_rows(dk, at * D, grad_k * (scale * LN2), real, D, WIDTH)
            store_rows(dv, at * DV, grad_v, real, DV, WIDTH_V)
            if bias is not None:
                if not BIAS_PER_HEAD:
                    tl.store(dbias + kv_head.to(tl.int64) * k_len + place, grad_b, mask=real)
