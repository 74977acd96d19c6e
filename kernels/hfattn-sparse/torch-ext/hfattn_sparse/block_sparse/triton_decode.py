"""Joining the splits of a list of keys (Flash-Decoding): each split attends on its own, lse weighs the results."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import LN2, LOG2E, NEG_INF, store_rows


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    part_out, part_lse, out, lse, rows, splits, DV: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr
):
    """out [rows, DV] and lse [rows] from part_out [splits, rows, DV] and part_lse [splits, rows]; all contiguous.

    Grid (ceil(rows / BLOCK_M),). A split without a visible key has lse -inf and counts for nothing.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < rows
    column = tl.arange(0, WIDTH_V)
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    for split in range(0, splits):
        at = row + tl.cast(rows, tl.int64) * split
        weight = tl.load(part_lse + at, mask=real, other=NEG_INF) * LOG2E
        used = weight != NEG_INF
        new_top = tl.maximum(top, weight)
        base = tl.where(new_top == NEG_INF, 0.0, new_top)
        decay, share = tl.exp2(top - base), tl.exp2(weight - base)
        top = new_top
        mask = used[:, None] & (column < DV)[None, :]
        values = tl.load(part_out + at[:, None] * DV + column[None, :], mask=mask, other=0.0)
        acc = acc * decay[:, None] + values * share[:, None]
        total = total * decay + share
    safe = tl.where(total == 0.0, 1.0, total)
    store_rows(out, row * DV, acc / safe[:, None], real, DV, WIDTH_V)
    tl.store(lse + row, tl.where(total == 0.0, NEG_INF, (top + tl.log2(safe)) * LN2), mask=real)
