"""The kernels of pyramid attention: the pools, and an online softmax over them, level after level.

One program of the latter is a tile of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import LN2, NEG_INF, finite, load_rows, query_rows, store_rows


@triton.jit
def _attend(
    acc, total, top, query, position, k, v, shift, ends, ids, listed, size, base, span, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the pools of one level of the `listed` blocks at `ids` to acc [M, WIDTH_V], total [M] and top [M].

    A block has `size` pools of the level, from row `base` of its `span` rows on. CAREFUL: values that are not finite
    become NaN in the rows that see them and nothing in the others; otherwise they break the tile.
    """
    for first in tl.range(0, listed * size, BLOCK_N, num_stages=1 if CAREFUL else None):
        flat = first + tl.arange(0, BLOCK_N)
        nth = flat // size
        there = nth < listed
        number = tl.load(ids + nth, mask=there, other=0)
        place = number * span + base + flat - nth * size
        bias = tl.load(shift + place, mask=there, other=NEG_INF)
        real = bias > NEG_INF
        place = place.to(tl.int64)
        keys = load_rows(k, place * D, 1, real, D, WIDTH, True, UPCAST)
        values = load_rows(v, place * DV, 1, real, DV, WIDTH_V, True, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale + bias[None, :]
        if CAUSAL:
            end = tl.load(ends + place, mask=there, other=0)
            seen = real[None, :] & (end[None, :] <= position[:, None])
        else:
            seen = real[None, :]
        if CAREFUL:
            usable = finite(values)
            broken = tl.min(usable.to(tl.int32), 1) == 0
            values = tl.where(usable, values, tl.zeros_like(values))
            hit = tl.max((seen & broken[None, :]).to(tl.int32), 1) > 0
            total = tl.where(hit, float("nan"), total)
        scores = tl.where(seen, scores, NEG_INF)
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(top - safe)
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit
def _walk(
    query, position, k, v, shift, ends, ids, counts, block_k, span, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All levels of a tile of queries: acc, sum and maximum of the weights."""
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    for level in range(4):
        size = block_k >> level
        listed = tl.load(counts + level)
        acc, total, top = _attend(
            acc, total, top, query, position, k, v, shift, ends, ids, listed, size, 2 * block_k - 2 * size, span, scale,
            D, DV, WIDTH, WIDTH_V, BLOCK_N, CAUSAL, CAREFUL, PRECISION, UPCAST,
        )  # fmt: skip
        ids += listed
    return acc, total, top


@triton.jit(do_not_specialize=["q_len", "q_blocks", "k_blocks", "list_heads", "subs", "offset"])
def forward_kernel(
    q, k, v, out, lse, ids, counts, shift, ends,
    q_sb, q_sh, q_sn, q_sd, heads, group, q_len, q_blocks, k_blocks, list_rows, list_heads, block_q, block_k, subs,
    offset, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (q_blocks * subs, heads, B).

    k [B, heads / group, k_blocks * 15 block_k / 8, D] and v are the pyramid, shift and ends [its rows] the log2 weight
    of a pool (-inf where it is none) and the position of its last member. ids [list_rows, list_heads, q_blocks,
    k_blocks] are key blocks sorted by level, counts [.., 4] how many have level 1, 2, 4 and 8. out and lse are
    contiguous; scale includes log2(e).
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Late tiles of a causal call read the most: they start first.
    block = q_blocks - 1 - part // subs
    span = block_k // 8 * 15
    table = (batch.to(tl.int64) * (heads // group) + head // group) * k_blocks * span
    k += table * D
    v += table * DV
    row, member, real, low, high = query_rows(block, part % subs, q_len, block_q, 1, BLOCK_M)
    q_at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + row.to(tl.int64) * q_sn
    query = load_rows(q, q_at, q_sd, real, D, WIDTH, True, UPCAST)
    line = (tl.minimum(batch, list_rows - 1).to(tl.int64) * list_heads + tl.minimum(head, list_heads - 1)) * q_blocks
    ids += (line + block) * k_blocks
    counts += (line + block) * 4
    acc, total, top = _walk(
        query, row + offset, k, v, shift, ends, ids, counts, block_k, span, scale,
        D, DV, WIDTH, WIDTH_V, BLOCK_M, BLOCK_N, CAUSAL, False, PRECISION, UPCAST,
    )  # fmt: skip
    # Without causality every row sees what its tile reads. A weight of 0 times what is not finite is NaN.
    if CAUSAL:
        if tl.min(finite(acc).to(tl.int32)) == 0:
            acc, total, top = _walk(
                query, row + offset, k, v, shift, ends, ids, counts, block_k, span, scale,
                D, DV, WIDTH, WIDTH_V, BLOCK_M, BLOCK_N, CAUSAL, True, PRECISION, UPCAST,
            )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    at = (batch.to(tl.int64) * heads + head) * q_len + row
    store_rows(out, at * DV, acc / safe[:, None], real, DV, WIDTH_V)
    tl.store(lse + at, tl.where(total == 0.0, NEG_INF, (top + tl.log2(safe)) * LN2), mask=real)


@triton.jit
def _pool(
    sums, table, inverse, column, owned, D: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr
):
    """Sums of neighbours [COUNT, TILE]; their means go into the table from row FIRST on."""
    sums = tl.sum(tl.reshape(sums, [COUNT, 2, TILE]), 1)
    pool = FIRST + tl.arange(0, COUNT)
    mean = sums * tl.load(inverse + pool)[:, None]
    tl.store(table + pool[:, None] * D + column[None, :], mean.to(table.dtype.element_ty), mask=owned)
    return sums


@triton.jit(do_not_specialize=["length"])
def pool_kernel(
    x, table, inverse, x_sb, x_sh, x_sn, x_sd, heads, length, blocks,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, tiles of columns, B * heads): the pools of one block, table [B * heads, blocks, 15 BLOCK / 8, D].

    inverse fp32 [blocks, 15 BLOCK / 8]: one over the members of a pool. CLAMP: the last token stands for missing ones.
    """
    block, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    x += head // heads * x_sb + head % heads * x_sh
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    owned = (column < D)[None, :]
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < length
    if CLAMP:
        token = tl.minimum(token, length - 1)
        real = token >= 0
    at = x + token.to(tl.int64)[:, None] * x_sn + column.to(tl.int64)[None, :] * x_sd
    tile = tl.load(at, mask=real[:, None] & owned, other=0.0)
    span: tl.constexpr = BLOCK // 8 * 15
    table += (head * blocks + block) * span * D
    inverse += block * span
    row = tl.arange(0, BLOCK)
    tl.store(table + row[:, None] * D + column[None, :], tile, mask=owned)
    sums = tile.to(tl.float32)
    sums = _pool(sums, table, inverse, column, owned, D, TILE, BLOCK // 2, BLOCK)
    sums = _pool(sums, table, inverse, column, owned, D, TILE, BLOCK // 4, BLOCK // 2 * 3)
    _pool(sums, table, inverse, column, owned, D, TILE, BLOCK // 8, BLOCK // 4 * 7)
