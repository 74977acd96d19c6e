"""Decayed linear attention: a state in registers that walks over the blocks of a sequence.

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


@triton.jit(do_not_specialize=["length", "segments", "span"])
def linear_kernel(
    q, k, v, slopes, out, initial, final, borders,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, s_sb, s_sh, s_sn,
    i_sb, i_sh, i_ss, i_sd, i_se, f_sb, f_sh, f_ss, length, segments, span, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of columns, heads, rows * segments or packed sequences); each program owns TILE columns of v and out.

    Rows are cut into `segments` of `span` tokens. out [B, H, length, DV] is contiguous, or None: only states are
    wanted. slopes fp32 by strides. initial, final: fp32 states [D, DV] of every row, head and segment by strides, in
    the order of the walk; or None. borders int [sequences + 1], or None: rows are rows of the batch.
    REVERSE: a token reads itself and the tokens behind it; the state walks from the end to the start.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row, segment = row // segments, row % segments
    batch, begin = row.to(tl.int64), segment * span
    count = tl.minimum(span, length - begin)
    order = segment
    if REVERSE:
        order = segments - 1 - segment
    if borders is not None:
        batch = tl.zeros([], tl.int64)
        begin = tl.load(borders + row).to(tl.int32)
        count = tl.load(borders + row + 1).to(tl.int32) - begin
    far = head.to(tl.int64)
    q += batch * q_sb + far * q_sh
    k += batch * k_sb + far * k_sh
    v += batch * v_sb + far * v_sh + tile.to(tl.int64) * TILE * v_sd
    slopes += batch * s_sb + far * s_sh
    if out is not None:
        out += (batch * heads + far) * length * DV + tile * TILE
    column = tile * TILE + tl.arange(0, TILE)
    state = tl.zeros([WIDTH, TILE], tl.float32)
    if initial is not None:
        initial += row.to(tl.int64) * i_sb + far * i_sh + order.to(tl.int64) * i_ss
        at, inside = _state_tile(initial, column, i_sd, i_se, D, DV, WIDTH)
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
            near, rest = total - passed, passed
        else:
            near, rest = passed, total - passed
        if out is not None:
            query = load_rows(q, place * q_sn, q_sd, real, D, WIDTH, True, UPCAST)
            if REVERSE:
                distance = passed[None, :] - passed[:, None]
                seen = spot[None, :] >= spot[:, None]
            else:
                distance = passed[:, None] - passed[None, :]
                seen = spot[None, :] <= spot[:, None]
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            scores = scores * tl.exp(tl.where(seen, -distance, float("-inf")))
            early = (query * tl.exp(-near)[:, None]).to(query.dtype)
            acc = tl.dot(early, state.to(query.dtype), input_precision=PRECISION)
            acc = tl.dot(scores.to(values.dtype), values, acc, input_precision=PRECISION)
            into = out + place[:, None] * DV + tl.arange(0, TILE)[None, :]
            tl.store(into, (acc * scale).to(out.dtype.element_ty), mask=owned)
        late = (keys * tl.exp(-rest)[:, None]).to(keys.dtype)
        state = tl.dot(tl.trans(late), values, state * tl.exp(-total), input_precision=PRECISION)
    if final is not None:
        final += row.to(tl.int64) * f_sb + far * f_sh + order.to(tl.int64) * f_ss
        at, inside = _state_tile(final, column, DV, 1, D, DV, WIDTH)
        tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def carry_kernel(states, totals, t_sb, t_sh, heads, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (pieces of a state, rows * heads). states fp32 [rows * heads, segments + 1, SIZE], changed in place.

    The first is the initial state, the others what each segment adds; then each is the state behind its segment.
    totals: decay exponent of every segment, [.., segments] by strides of row and head.
    """
    piece, row = tl.program_id(0), tl.program_id(1)
    place = piece * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    states += row.to(tl.int64) * (segments + 1) * SIZE + place
    totals += (row // heads).to(tl.int64) * t_sb + (row % heads) * t_sh
    running = tl.load(states, mask=inside, other=0.0)
    for number in range(0, segments):
        states += SIZE
        added = tl.load(states, mask=inside, other=0.0)
        running = running * tl.exp(-tl.load(totals + number)) + added
        tl.store(states, running, mask=inside)
