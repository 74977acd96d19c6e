"""Backward kernel of neighborhood attention: one pass over the halo of each tile, keys' gradients by atomic adds."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import LOG2E, finite, load_rows, store_rows
from .triton_forward import axis_bounds, query_tile, sees


@triton.jit
def _add_rows(base, offset, tile, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Add a tile [rows, WIDTH] to contiguous fp32 rows."""
    column = tl.arange(0, WIDTH)
    inside = real[:, None] & (column < DIM)[None, :]
    tl.atomic_add(base + offset[:, None] + column[None, :], tile, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["size", "halo", "extra", "total"])
def backward_kernel(
    q, k, v, grad_out, delta, lse, bias, mask, queries, keys, kinds, tables, grad_q, grad_k, grad_v, grad_bias,
    q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    heads, group, total, size, halo, extra, s0, s1, s2, h1, h2, w0, w1, w2, widest, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid as the forward. grad_out [B, N, heads, DV], delta and lse [B, N, heads] are contiguous; delta is
    sum(grad_out * out) - grad_lse. grad_k, grad_v: fp32 [B, N + extra, heads // group, D | DV], zeroed; grad_bias fp32
    as bias, zeroed; scale is the plain one."""
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
        grad_bias += head.to(tl.int64) * w0 * w1 * w2
    row = (batch.to(tl.int64) * total + token) * heads + head
    query = load_rows(q, token.to(tl.int64) * q_sn, q_sd, real, D, WIDTH, True, UPCAST)
    upstream = load_rows(grad_out, row * DV, 1, real, DV, WIDTH_V, True, UPCAST)
    shift = tl.load(lse + row, mask=real, other=0.0)
    # A row without keys has lse -inf, and no weights anyway.
    shift = tl.where(shift == float("-inf"), 0.0, shift) * LOG2E
    own = tl.load(delta + row, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in range(0, halo + extra, BLOCK_N):
        spot = first + tl.arange(0, BLOCK_N)
        near = spot < halo
        far = (spot >= halo) & (spot < halo + extra)
        place = tl.load(keys + tile.to(tl.int64) * halo + spot, mask=near, other=0)
        place = tl.where(far, total + spot - halo, place)
        e2 = spot % h2
        e1 = spot // h2 % h1
        e0 = spot // (h1 * h2)
        seen = sees(e0, low0, high0) & sees(e1, low1, high1) & sees(e2, low2, high2) & near[None, :]
        seen = (seen | far[None, :]) & real[:, None]
        if HAS_MASK:
            shown = tl.load(mask + batch.to(tl.int64) * (total + extra) + place, mask=near | far, other=0)
            seen = seen & (shown != 0)[None, :]
        key = load_rows(k, place.to(tl.int64) * k_sn, k_sd, near | far, D, WIDTH, True, UPCAST)
        value = load_rows(v, place.to(tl.int64) * v_sn, v_sd, near | far, DV, WIDTH_V, True, UPCAST)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        where = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        if HAS_BIAS:
            where = ((e0 * w1 + e1) * w2 + e2)[None, :] - own_code[:, None]
            scores += tl.load(bias + where, mask=seen & near[None, :], other=0.0) * LOG2E
        weights = tl.where(seen, tl.exp2(scores - shift[:, None]), 0.0)
        kv_row = (batch.to(tl.int64) * (total + extra) + place) * (heads // group) + head // group
        part_v = tl.dot(tl.trans(weights.to(upstream.dtype)), upstream, input_precision=PRECISION)
        _add_rows(grad_v, kv_row * DV, part_v, near | far, DV, WIDTH_V)
        grad_weights = tl.dot(upstream, tl.trans(value), input_precision=PRECISION)
        grad_scores = tl.where(seen, weights * (grad_weights - own[:, None]), 0.0)
        if HAS_BIAS:
            tl.atomic_add(grad_bias + where, grad_scores, mask=seen & near[None, :], sem="relaxed")
        narrow = (grad_scores * scale).to(query.dtype)
        # Hidden keys that are not finite must not meet the zeros of other rows.
        key = tl.where(finite(key), key, tl.zeros_like(key))
        acc = tl.dot(narrow, key, acc, input_precision=PRECISION)
        part_k = tl.dot(tl.trans(narrow), query, input_precision=PRECISION)
        _add_rows(grad_k, kv_row * D, part_k, near | far, D, WIDTH)
    store_rows(grad_q, row * D, acc, real, D, WIDTH)
