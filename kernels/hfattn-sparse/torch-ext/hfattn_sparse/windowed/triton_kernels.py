"""The forward kernel of attention to sinks and a window."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import NEG_INF, describe, finite, load_rows, places, query_rows, store_rows


@triton.jit
def _attend(
    acc, total, top, query, position, key, value, k_rows, batch, k_first, k_len, start, end, low, high, sinks, window,
    k_sn, k_sd, v_sn, v_sd, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add keys `start` to `end` to acc [M, WIDTH_V], total [M] and top [M]; queries stand at `low` to `high`.

    Where not every query sees every key of a tile, values that are not finite become NaN in the rows that see them and
    nothing in the others.
    """
    for first in range(start, end, BLOCK_N):
        spot = first + tl.arange(0, BLOCK_N)
        real = spot < end
        place = places(k_rows, batch, k_len, k_first + spot, real).to(tl.int64)
        keys = load_rows(key, place * k_sn, k_sd, real, D, WIDTH, True, UPCAST)
        values = load_rows(value, place * v_sn, v_sd, real, DV, WIDTH_V, True, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        near = spot[None, :] > position[:, None] - window
        seen = real[None, :] & (spot[None, :] <= position[:, None]) & (near | (spot < sinks)[None, :])
        scores = tl.where(seen, scores, NEG_INF)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        last = first + BLOCK_N - 1
        if (last > low) | (first <= high - window):
            usable = finite(values)
            broken = tl.min(usable.to(tl.int32), 1) == 0
            values = tl.where(usable, values, tl.zeros_like(values))
            hit = tl.max((seen & broken[None, :]).to(tl.int32), 1) > 0
            total = tl.where(hit, float("nan"), total)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["q_len", "k_len", "sinks", "window", "programs"])
def forward_kernel(
    q, k, v, out, q_rows, k_rows, count, tiles,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, heads, group, q_len, k_len, sinks, window,
    programs, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (programs, heads, B): a tile of BLOCK_M queries reads the sinks and the union of its rows' windows.

    out [B, heads, q_len, DV] is contiguous; scale includes log2(e).
    """
    program, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k += batch.to(tl.int64) * k_sb + (head // group).to(tl.int64) * k_sh
    v += batch.to(tl.int64) * v_sb + (head // group).to(tl.int64) * v_sh
    first, last, step = program, program + 1, 1
    if tiles is not None:
        last, step = tl.load(count + batch), programs
    for tile in range(first, last, step):
        block, number, q_first, q_length, k_first, k_length = describe(tiles, batch, tile, q_len, q_len, k_len)
        row, member, real, low, high = query_rows(block, 0, q_length, BLOCK_M, 1, BLOCK_M)
        place = places(q_rows, batch, q_len, q_first + row, real).to(tl.int64)
        offset = k_length - q_length
        position, low, high = row + offset, low + offset, high + offset
        q_at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + place * q_sn
        query = load_rows(q, q_at, q_sd, real, D, WIDTH, True, UPCAST)
        acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], NEG_INF, tl.float32)
        window_start = tl.maximum(low - window + 1, 0)
        # Sinks that reach into the windows are part of one range.
        sink_end = tl.where(window_start > sinks, sinks, 0)
        start = tl.where(window_start > sinks, window_start, 0)
        acc, total, top = _attend(
            acc, total, top, query, position, k, v, k_rows, batch, k_first, k_len, 0, sink_end, low, high, sinks,
            high + 1, k_sn, k_sd, v_sn, v_sd, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, PRECISION, UPCAST,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, query, position, k, v, k_rows, batch, k_first, k_len, start, high + 1, low, high, sinks,
            window, k_sn, k_sd, v_sn, v_sd, scale, D, DV, WIDTH, WIDTH_V, BLOCK_N, PRECISION, UPCAST,
        )  # fmt: skip
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        target = ((batch.to(tl.int64) * heads + head) * q_len + place) * DV
        store_rows(out, target, result, real, DV, WIDTH_V)
