"""The one kernel of decayed linear attention: a state in registers that walks over the blocks of a sequence.

Forward and all gradients are the same recurrence with the roles of the tensors changed, see `triton_path`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import load_rows


@triton.jit
def _state_tile(base, column, s_sd, s_se, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses and mask of the tile [WIDTH, columns] of a state."""
    dim = tl.arange(0, WIDTH)
    at = base + dim.to(tl.int64)[:, None] * s_sd + column.to(tl.int64)[None, :] * s_se
    return at, (dim < D)[:, None] & (column < DV)[None, :]


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    q, k, v, slopes, out, initial, final, borders,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, s_sb, s_sh, s_sn,
    i_sb, i_sh, i_sd, i_se, length, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of columns, heads, rows or packed sequences); each program owns TILE columns of v, out and the state.

    out [B, H, length, DV] and final fp32 [rows, H, D, DV] are contiguous. slopes fp32 by strides. initial fp32 by
    strides, or None. borders int [sequences + 1], or None: rows are rows of the batch.
    REVERSE: a token reads itself and the tokens behind it; the state walks from the end to the start.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    batch, begin, count = row.to(tl.int64), 0, length
    if borders is not None:
        batch = tl.zeros([], tl.int64)
        begin = tl.load(borders + row).to(tl.int32)
        count = tl.load(borders + row + 1).to(tl.int32) - begin
    far = head.to(tl.int64)
    q += batch * q_sb + far * q_sh
    k += batch * k_sb + far * k_sh
    v += batch * v_sb + far * v_sh + tile.to(tl.int64) * TILE * v_sd
    slopes += batch * s_sb + far * s_sh
    out += (batch * heads + far) * length * DV + tile * TILE
    column = tile * TILE + tl.arange(0, TILE)
    state = tl.zeros([WIDTH, TILE], tl.float32)
    if initial is not None:
        at, inside = _state_tile(initial + row.to(tl.int64) * i_sb + far * i_sh, column, i_sd, i_se, D, DV, WIDTH)
        state = tl.load(at, mask=inside, other=0.0)
    spot = tl.arange(0, BLOCK)
    blocks = tl.cdiv(count, BLOCK)
    for step in range(0, blocks):
        block = step
        if REVERSE:
            block = blocks - 1 - step
        token = block * BLOCK + spot
        real = token < count
        owned = real[:, None] & (column < DV)[None, :]
        place = (begin + token).to(tl.int64)
        query = load_rows(q, place * q_sn, q_sd, real, D, WIDTH, True, UPCAST)
        keys = load_rows(k, place * k_sn, k_sd, real, D, WIDTH, True, UPCAST)
        values = tl.load(
            v + place[:, None] * v_sn + tl.arange(0, TILE).to(tl.int64)[None, :] * v_sd,
            mask=owned,
            other=0.0,
        )
        if UPCAST:
            values = values.to(tl.float32)
        decay = tl.load(slopes + place * s_sn, mask=real, other=0.0)
        passed = tl.cumsum(decay, 0)
        total = tl.sum(decay, 0)
        # Differences of sums, never quotients of powers: these underflow for steep heads.
        if REVERSE:
            distance = passed[None, :] - passed[:, None]
            seen = spot[None, :] >= spot[:, None]
            near, rest = total - passed, passed
        else:
            distance = passed[:, None] - passed[None, :]
            seen = spot[None, :] <= spot[:, None]
            near, rest = passed, total - passed
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        scores = scores * tl.exp(tl.where(seen, -distance, float("-inf")))
        early = (query * tl.exp(-near)[:, None]).to(query.dtype)
        acc = tl.dot(early, state.to(query.dtype), input_precision=PRECISION)
        acc = tl.dot(scores.to(values.dtype), values, acc, input_precision=PRECISION)
        into = out + place[:, None] * DV + tl.arange(0, TILE)[None, :]
        tl.store(into, (acc * scale).to(out.dtype.element_ty), mask=owned)
        late = (keys * tl.exp(-rest)[:, None]).to(keys.dtype)
        state = tl.dot(tl.trans(late), values, state * tl.exp(-total), input_precision=PRECISION)
    at, inside = _state_tile(final + (row.to(tl.int64) * heads + far) * D * DV, column, DV, 1, D, DV, WIDTH)
    tl.store(at, state, mask=inside)
