"""Forward kernel of block-sparse attention: one program a tile of queries, an online softmax over its listed keys.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691, section 3.1), in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    LN2,
    NEG_INF,
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
def _attend(
    acc, total, top, query, position, k, v, bias, ids, k_rows, batch, begin, end, listed, k_first, k_length,
    k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add tiles begin to end of the listed keys to acc [M, WIDTH_V], total [M] and top [M] (sum and maximum).

    Without MASKED every query sees every key of these tiles. CAREFUL keeps values that are not finite from rows that do
    not see them; rows that do become NaN.
    """
    for tile in tl.range(begin, end, num_stages=1 if CAREFUL else None):
        key = listed_tokens(ids, tile, listed, block_k, k_length, BLOCK_N, EVEN)
        real = key < k_length
        place = places(k_rows, batch, k_len, k_first + key, real)
        if bias is not None:
            shift, real = load_bias(bias, place, real)
        place = place.to(tl.int64)
        usable = real
        if CAREFUL:
            usable &= (
                tl.min(finite(load_rows(v, place * v_sn, v_sd, real, DV, WIDTH_V, True, UPCAST)).to(tl.int32), 1) > 0
            )
        keys = load_rows(k, place * k_sn, k_sd, real, D, WIDTH, MASKED, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            visible = real[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= position[:, None])
            scores *= scale
            if bias is not None:
                scores += shift[None, :]
            scores = tl.where(visible, scores, NEG_INF)
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == NEG_INF, 0.0, new_top)
            weights = tl.exp2(scores - base[:, None])
        else:
            # Scaling after the maximum leaves one multiply-add a score; a negative scale turns the order around.
            if POSITIVE:
                new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            else:
                new_top = tl.maximum(top, tl.min(scores, 1) * scale)
            base = new_top
            weights = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        values = load_rows(v, place * v_sn, v_sd, usable, DV, WIDTH_V, MASKED, UPCAST)
        if CAREFUL:
            weights = tl.where((real & (usable == 0))[None, :] & visible, float("nan"), weights)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["q_len", "k_len", "q_blocks", "list_rows", "list_len", "programs", "subs", "splits"])
def forward_kernel(
    q, k, v, lists, bias, out, lse, q_rows, k_rows, count, tiles,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, bias_sb, bias_sh,
    q_len, k_len, q_heads, group, block_q, block_k, q_blocks, list_rows, list_heads, list_len, list_share, bias_share,
    programs, subs, splits, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr, PER_SEQUENCE: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (programs * subs * splits, heads / FOLD, B).

    out [splits, B, q_heads, q_len, DV] and lse [splits, B, q_heads, q_len] are contiguous; split s attends to its share
    of every list. bias is [., ., k_len] with contiguous keys. scale includes log2(e). PRECISION is that of fp32 dots.
    """
    part = tl.program_id(0)
    head = tl.program_id(1) * FOLD
    batch = tl.program_id(2)
    split = part % splits
    sub = (part // splits) % subs
    program = part // splits // subs
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
            if CAUSAL:  # the longest lists first
                tile = programs - 1 - program
        block, number, q_first, q_length, k_first, k_length = describe(tiles, batch, tile, q_len, q_len, k_len)
        row, member, real, low, high = query_rows(block, sub, q_length, block_q, FOLD, BLOCK_M)
        place = places(q_rows, batch, q_len, q_first + row, real).to(tl.int64)
        q_at = batch.to(tl.int64) * q_sb + (head + member).to(tl.int64) * q_sh + place * q_sn
        query = load_rows(q, q_at, q_sd, real, D, WIDTH, True, UPCAST)

        ids = list_of(
            lists, batch, number, head, block, list_rows, list_heads, q_blocks, list_len, list_share, PER_SEQUENCE
        )
        offset = k_length - q_length
        whole, tiles_k, listed = key_tiles(
            ids, list_len, low + offset, high + offset, k_length, block_k, BLOCK_N, CAUSAL
        )
        if bias is not None:
            whole = 0
        each = (tiles_k + splits - 1) // splits
        begin = tl.minimum(split * each, tiles_k)
        stop = tl.minimum(begin + each, tiles_k)
        middle = tl.minimum(tl.maximum(whole, begin), stop)

        acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], NEG_INF, tl.float32)
        if bias is None:
            acc, total, top = _attend(
                acc, total, top, query, row + offset, k, v, bias, ids, k_rows, batch, begin, middle, listed,
                k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, EVEN,
                CAUSAL, False, False, POSITIVE, PRECISION, UPCAST,
            )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, query, row + offset, k, v, bias, ids, k_rows, batch, middle, stop, listed,
            k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, EVEN,
            CAUSAL, True, False, POSITIVE, PRECISION, UPCAST,
        )  # fmt: skip
        if CAUSAL:
            # 0 * NaN: a value that a row does not see may have spoilt it. Rare, so found out afterwards.
            spoilt = tl.max(tl.max((finite(acc) == 0).to(tl.int32), 1), 0)
            if spoilt > 0:
                acc, total, top = _attend(
                    tl.zeros([BLOCK_M, WIDTH_V], tl.float32), tl.zeros([BLOCK_M], tl.float32),
                    tl.full([BLOCK_M], NEG_INF, tl.float32), query, row + offset, k, v, bias, ids, k_rows, batch, begin,
                    stop, listed, k_first, k_length, k_sn, k_sd, v_sn, v_sd, k_len, block_k, scale, D, DV, WIDTH,
                    WIDTH_V, BLOCK_N, EVEN, CAUSAL, True, True, POSITIVE, PRECISION, UPCAST,
                )  # fmt: skip

        safe = tl.where(total == 0.0, 1.0, total)
        at = ((split * tl.num_programs(2) + batch).to(tl.int64) * q_heads + head + member) * q_len + place
        store_rows(out, at * DV, acc / safe[:, None], real, DV, WIDTH_V)
        tl.store(lse + at, tl.where(total == 0.0, NEG_INF, (top + tl.log2(safe)) * LN2), mask=real)
