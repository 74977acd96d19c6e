"""Forward kernel of neighborhood attention: tiles of queries against the halo of keys that they share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import LN2, LOG2E, NEG_INF, finite, load_rows, store_rows


@triton.jit
def query_tile(queries, kinds, tables, tile, part, size, s0, s1, s2, BLOCK_M: tl.constexpr):
    """Tokens of part `part` of a tile, which of them are real, and low, high and spot along the three axes, [BLOCK_M].

    queries: int32 [tiles, size], -1 is padding; kinds: int32 [tiles, 3]; tables: int32 [kinds of all axes, 3, widest],
    rows of an axis behind those of the one before, and `kinds` counts over all of them.
    """
    flat = part * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(queries + tile.to(tl.int64) * size + flat, mask=flat < size, other=-1)
    i2 = flat % s2
    i1 = flat // s2 % s1
    i0 = tl.minimum(flat // (s1 * s2), s0 - 1)
    return token, token >= 0, i0, i1, i2


@triton.jit
def axis_bounds(kinds, tables, tile, AXIS: tl.constexpr, index, widest):
    """First key, end of keys and own place of each query in the halo along an axis."""
    at = tables + tl.load(kinds + tile.to(tl.int64) * 3 + AXIS) * 3 * widest + index
    return tl.load(at), tl.load(at + widest), tl.load(at + 2 * widest)


@triton.jit
def sees(spot, low, high):
    """Bool [BLOCK_M, BLOCK_N]: low <= spot < high."""
    return (low[:, None] <= spot[None, :]) & (spot[None, :] < high[:, None])


@triton.jit
def _attend(
    query, k, v, bias, mask, keys, low0, high0, low1, high1, low2, high2, own_code, tile, batch, total, halo, extra,
    k_sn, k_sd, v_sn, v_sd, h1, h2, w1, w2, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile over its halo: acc [BLOCK_M, WIDTH_V], sum and maximum of the weights.

    CAREFUL: what is not finite breaks the rows that see it and no others; otherwise it breaks the whole tile.
    """
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    for first in tl.range(0, halo + extra, BLOCK_N, num_stages=1 if CAREFUL else None):
        spot = first + tl.arange(0, BLOCK_N)
        near = spot < halo
        far = (spot >= halo) & (spot < halo + extra)
        place = tl.load(keys + tile.to(tl.int64) * halo + spot, mask=near, other=0)
        place = tl.where(far, total + spot - halo, place)
        e2 = spot % h2
        e1 = spot // h2 % h1
        e0 = spot // (h1 * h2)
        seen = sees(e0, low0, high0) & sees(e1, low1, high1) & sees(e2, low2, high2) & near[None, :]
        seen = seen | far[None, :]
        if HAS_MASK:
            shown = tl.load(mask + batch.to(tl.int64) * (total + extra) + place, mask=near | far, other=0)
            seen = seen & (shown != 0)[None, :]
        key = load_rows(k, place.to(tl.int64) * k_sn, k_sd, near | far, D, WIDTH, True, UPCAST)
        value = load_rows(v, place.to(tl.int64) * v_sn, v_sd, near | far, DV, WIDTH_V, True, UPCAST)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if HAS_BIAS:
            where = ((e0 * w1 + e1) * w2 + e2)[None, :] - own_code[:, None]
            scores += tl.load(bias + where, mask=seen & near[None, :], other=0.0) * LOG2E
        scores = tl.where(seen, scores, NEG_INF)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        norm = norm * decay + tl.sum(weights, 1)
        if CAREFUL:
            usable = finite(value)
            broken = tl.min(usable.to(tl.int32), 1) == 0
            value = tl.where(usable, value, tl.zeros_like(value))
            hit = tl.max((seen & broken[None, :]).to(tl.int32), 1) > 0
            norm = tl.where(hit, float("nan"), norm)
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, norm, top


@triton.jit(do_not_specialize=["size", "halo", "extra", "total"])
def forward_kernel(
    q, k, v, out, lse, bias, mask, queries, keys, kinds, tables,
    q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    heads, group, total, size, halo, extra, s0, s1, s2, h1, h2, w0, w1, w2, widest, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * parts of a tile, heads, B); keys int32 [tiles, halo]; scale includes log2(e).

    out [B, N, heads, DV] and lse [B, N, heads] are contiguous; bias fp32 [heads, w0 * w1 * w2]; mask uint8
    [B, N + extra]; h1, h2: halo along the last two axes.
    """
    parts = (size + BLOCK_M - 1) // BLOCK_M
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    head, batch = tl.program_id(1), tl.program_id(2)
    q += batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
    k += batch.to(tl.int64) * k_sb + (head // group).to(tl.int64) * k_sh
    v += batch.to(tl.int64) * v_sb + (head // group).to(tl.int64) * v_sh
    token, real, i0, i1, i2 = query_tile(queries, kinds, tables, tile, part, size, s0, s1, s2, BLOCK_M)
    low0, high0, at0 = axis_bounds(kinds, tables, tile, 0, i0, widest)
    low1, high1, at1 = axis_bounds(kinds, tables, tile, 1, i1, widest)
    low2, high2, at2 = axis_bounds(kinds, tables, tile, 2, i2, widest)
    # Entry of a pair in the bias table: code of the key minus code of the query.
    own_code = (at0 * w1 + at1) * w2 + at2 - (w0 // 2 * w1 + w1 // 2) * w2 - w2 // 2
    if HAS_BIAS:
        bias += head.to(tl.int64) * w0 * w1 * w2
    query = load_rows(q, token.to(tl.int64) * q_sn, q_sd, real, D, WIDTH, True, UPCAST)
    acc, norm, top = _attend(
        query, k, v, bias, mask, keys, low0, high0, low1, high1, low2, high2, own_code, tile, batch, total, halo, extra,
        k_sn, k_sd, v_sn, v_sd, h1, h2, w1, w2, scale,
        D, DV, WIDTH, WIDTH_V, BLOCK_M, BLOCK_N, HAS_BIAS, HAS_MASK, False, PRECISION, UPCAST,
    )  # fmt: skip
    # A weight of 0 times what is not finite is NaN: seldom, so that it may cost a second walk.
    if tl.min(finite(acc).to(tl.int32)) == 0:
        acc, norm, top = _attend(
            query, k, v, bias, mask, keys, low0, high0, low1, high1, low2, high2, own_code, tile, batch, total, halo,
            extra, k_sn, k_sd, v_sn, v_sd, h1, h2, w1, w2, scale,
            D, DV, WIDTH, WIDTH_V, BLOCK_M, BLOCK_N, HAS_BIAS, HAS_MASK, True, PRECISION, UPCAST,
        )  # fmt: skip
    result = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    row = (batch.to(tl.int64) * total + token) * heads + head
    store_rows(out, row * DV, result, real, DV, WIDTH_V)
    found = tl.where(norm == 0.0, NEG_INF, (top + tl.log2(tl.where(norm == 0.0, 1.0, norm))) * LN2)
    tl.store(lse + row, found, mask=real)
