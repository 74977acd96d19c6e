"""Forward kernel of quantised block-sparse attention: one program a query block of a head.

The weights of a block are rounded with the block's largest weight, which is known only once every row's maximum is:
with quantised P a first pass over the keys finds the maxima.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import NEG_INF, UNUSED, load_rows, store_rows


@triton.jit
def _scores(
    query, q_factor, ids, nth, k, k_scale, k_mask, k_sn, k_sd, block_k, k_group, k_len, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] in units of log 2 of one listed block, its keys [N] and which of them are real."""
    inside = tl.arange(0, BLOCK_N)
    token = tl.load(ids + nth) * block_k + inside
    real = (inside < block_k) & (token < k_len)
    if k_mask is not None:
        real = real & (tl.load(k_mask + token, mask=real, other=0) != 0)
    keys = load_rows(k, token.to(tl.int64) * k_sn, k_sd, real, D, WIDTH, True, UPCAST and not CODES)
    if CODES:
        factor = tl.load(k_scale + token // k_group, mask=real, other=0.0)
        scores = tl.dot(query, tl.trans(keys)).to(tl.float32) * q_factor[:, None] * factor[None, :]
    else:
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    return tl.where(real[None, :], scores, NEG_INF), token, real


@triton.jit(do_not_specialize=["q_len", "k_len", "q_blocks", "list_rows", "list_len"])
def forward_kernel(
    q, k, v, q_scale, k_scale, v_scale, k_mask, lists, out,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mask_sb,
    q_len, k_len, group, block_q, block_k, q_group, k_group, q_groups, k_groups, q_blocks, list_rows, list_heads,
    list_len, list_share, scale, p_max,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CODES: tl.constexpr, P_CODES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (q_blocks, heads, B); out [B, heads, q_len, DV] contiguous.

    CODES: q and k are int8 with scales [B, heads, groups]; P_CODES: v is int8 with scales [B, kv heads, DV] and P is
    rounded to p_max steps. scale includes log2(e). lists ascend, UNUSED last.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    kv = head // group
    k += batch.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    v += batch.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh
    if k_mask is not None:
        k_mask += batch.to(tl.int64) * mask_sb
    inside = tl.arange(0, BLOCK_M)
    row = block * block_q + inside
    real_q = (inside < block_q) & (row < q_len)
    q_at = batch.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + row.to(tl.int64) * q_sn
    query = load_rows(q, q_at, q_sd, real_q, D, WIDTH, True, UPCAST and not CODES)
    q_factor = tl.zeros([BLOCK_M], tl.float32)
    if CODES:
        q_scale += (batch.to(tl.int64) * heads + head) * q_groups
        k_scale += (batch.to(tl.int64) * (heads // group) + kv) * k_groups
        q_factor = tl.load(q_scale + row // q_group, mask=real_q, other=0.0) * scale

    ids = (
        lists
        + ((tl.minimum(batch, list_rows - 1).to(tl.int64) * list_heads + head // list_share) * q_blocks + block)
        * list_len
    )
    listed = 0
    for start in range(0, list_len, 64):
        at = start + tl.arange(0, 64)
        listed += tl.sum((tl.load(ids + at, mask=at < list_len, other=UNUSED) != UNUSED).to(tl.int32), 0)

    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    if P_CODES:
        for nth in range(0, listed):
            scores, _, _ = _scores(
                query, q_factor, ids, nth, k, k_scale, k_mask, k_sn, k_sd, block_k, k_group, k_len, scale, D, WIDTH,
                BLOCK_N, CODES, PRECISION, UPCAST,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(scores, 1))

    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for nth in range(0, listed):
        scores, token, real = _scores(
            query, q_factor, ids, nth, k, k_scale, k_mask, k_sn, k_sd, block_k, k_group, k_len, scale, D, WIDTH,
            BLOCK_N, CODES, PRECISION, UPCAST,
        )  # fmt: skip
        values = load_rows(v, token.to(tl.int64) * v_sn, v_sd, real, DV, WIDTH_V, True, UPCAST and not P_CODES)
        if P_CODES:
            base = tl.where(top == NEG_INF, 0.0, top)
            weights = tl.where(real_q[:, None], tl.exp2(scores - base[:, None]), 0.0)
            total += tl.sum(weights, 1)
            step = tl.maximum(tl.max(tl.max(weights, 1), 0), 1e-7) / p_max
            scaled = weights / step
            # Adding and taking away 2^23 rounds halves to even.
            codes = ((scaled + 8388608.0) - 8388608.0).to(tl.int8)
            acc += tl.dot(codes, values).to(tl.float32) * step
        else:
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == NEG_INF, 0.0, new_top)
            weights = tl.exp2(scores - base[:, None])
            decay = tl.exp2(top - base)
            top = new_top
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    if P_CODES:
        column = tl.arange(0, WIDTH_V)
        v_scale += (batch.to(tl.int64) * (heads // group) + kv) * DV
        acc *= tl.load(v_scale + column, mask=column < DV, other=0.0)[None, :]
    safe = tl.where(total == 0.0, 1.0, total)
    at = (batch.to(tl.int64) * heads + head) * q_len + row
    store_rows(out, at * DV, acc / safe[:, None], real_q, DV, WIDTH_V)
