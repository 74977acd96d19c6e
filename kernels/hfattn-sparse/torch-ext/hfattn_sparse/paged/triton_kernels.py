"""The kernels of paged decoding: statistics of keys, page scores, and attention over lists of pages."""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.triton_common import LN2, NEG_INF, load_rows


@triton.jit(do_not_specialize=["length", "pages"])
def statistics_kernel(
    key, stats, stride_b, stride_h, stride_n, stride_d, heads, length, pages, page_size, logical_size,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Channel-wise maximum and minimum of the keys of each logical page of one physical page; NaN where a key is NaN.

    Grid (pages, heads, B). stats [B, heads, pages, page_size / logical_size, 2, DIM] is contiguous.
    """
    page, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, WIDTH)
    logical = page_size // logical_size
    key += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    stats += ((batch.to(tl.int64) * heads + head) * pages + page) * logical * 2 * DIM
    for number in range(0, logical):
        first = page * page_size + number * logical_size
        size = tl.minimum(length - first, logical_size)
        high = tl.full([WIDTH], NEG_INF, tl.float32)
        low = tl.full([WIDTH], float("inf"), tl.float32)
        broken = tl.zeros([WIDTH], tl.int32)
        for done in range(0, size, CHUNK):
            place = done + tl.arange(0, CHUNK)
            real = place < size
            tile = load_rows(key, (first + place).to(tl.int64) * stride_n, stride_d, real, DIM, WIDTH, True, True)
            high = tl.maximum(high, tl.max(tl.where(real[:, None], tile, NEG_INF), 0))
            low = tl.minimum(low, tl.min(tl.where(real[:, None], tile, float("inf")), 0))
            broken = tl.maximum(broken, tl.max((tile != tile).to(tl.int32), 0))
        high = tl.where(broken > 0, float("nan"), high)
        low = tl.where(broken > 0, float("nan"), low)
        target = stats + number * 2 * DIM + column
        tl.store(target, high.to(stats.dtype.element_ty), mask=column < DIM)
        tl.store(target + DIM, low.to(stats.dtype.element_ty), mask=column < DIM)


@triton.jit(do_not_specialize=["pages"])
def scores_kernel(
    query, stats, out, q_sb, q_sh, q_sd, s_sb, s_sh, s_sp, heads, pages, logical,
    DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out [B, heads * GROUP, pages] = max over logical pages of relu(q).kmax + min(q, 0).kmin, fp32; NaN stays NaN.

    Grid (ceil(pages / BLOCK_N), heads, B). stats [B, heads, pages, logical, 2, DIM], contiguous from `logical` on.
    Products of half-precision numbers are exact in fp32, so matrix units in that type lose nothing.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = page < pages
    member = tl.arange(0, BLOCK_M)
    query += batch.to(tl.int64) * q_sb + head.to(tl.int64) * GROUP * q_sh
    stats += batch.to(tl.int64) * s_sb + head.to(tl.int64) * s_sh
    q = load_rows(query, member.to(tl.int64) * q_sh, q_sd, member < GROUP, DIM, WIDTH, True, UPCAST)
    zero = tl.zeros_like(q)
    up, down = tl.where(q < 0, zero, q), tl.where(q > 0, zero, q)
    best = tl.full([BLOCK_M, BLOCK_N], NEG_INF, tl.float32)
    broken = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for number in range(0, logical):
        at = page.to(tl.int64) * s_sp + number * 2 * DIM
        empty = tl.load(stats + at, mask=real, other=0.0).to(tl.float32) == NEG_INF
        kept = real & (empty == 0)
        high = load_rows(stats, at, 1, kept, DIM, WIDTH, True, UPCAST).to(q.dtype)
        low = load_rows(stats + DIM, at, 1, kept, DIM, WIDTH, True, UPCAST).to(q.dtype)
        score = tl.dot(up, tl.trans(high), input_precision="ieee")
        score = tl.dot(down, tl.trans(low), score, input_precision="ieee")
        score = tl.where(kept[None, :], score, NEG_INF)
        broken = tl.maximum(broken, (score != score).to(tl.int32))
        best = tl.maximum(best, score)
    best = tl.where(broken > 0, float("nan"), best)
    row = (batch.to(tl.int64) * heads + head) * GROUP + member
    tl.store(out + row[:, None] * pages + page[None, :], best, mask=(member < GROUP)[:, None] & real[None, :])


@triton.jit
def _halves(tile, like):
    """Even and odd channels of packed 4-bit codes, exact in the type of `like`."""
    return (tile & 15).to(tl.float32).to(like.dtype), (tile >> 4).to(tl.float32).to(like.dtype)


@triton.jit
def _rows(
    data, offset, stride, real, like, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UPCAST: tl.constexpr
):
    """Floating rows or codes of a byte, in the type of `like`."""
    if BITS == 0:
        tile = load_rows(data, offset, stride, real, DIM, WIDTH, True, UPCAST)
    else:
        tile = load_rows(data, offset, stride, real, DIM, WIDTH, True, False).to(tl.float32)
    return tile.to(like.dtype)


@triton.jit
def _load_query(
    query, offset, stride, real, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UPCAST: tl.constexpr
):
    """The query tile, and for packed keys its odd channels apart (else the same again)."""
    if BITS == 4:
        even = load_rows(query, offset, 2 * stride, real, DIM // 2, WIDTH, True, UPCAST)
        odd = load_rows(query + stride, offset, 2 * stride, real, DIM // 2, WIDTH, True, UPCAST)
    else:
        even = load_rows(query, offset, stride, real, DIM, WIDTH, True, UPCAST)
        odd = even
    return even, odd


@triton.jit
def _key_scores(
    q, q_odd, q_sum, data, scale, zero, offset, entry, stride, stored, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """q.k [M, N]: with codes q.(s (c - z)) = s (q.c - z sum(q)), so no key is dequantised."""
    if BITS == 4:
        even, odd = _halves(load_rows(data, offset, stride, stored, DIM // 2, WIDTH, True, False), q)
        scores = tl.dot(q, tl.trans(even), input_precision=PRECISION)
        scores = tl.dot(q_odd, tl.trans(odd), scores, input_precision=PRECISION)
    else:
        tile = _rows(data, offset, stride, stored, q, DIM, WIDTH, BITS, UPCAST)
        scores = tl.dot(q, tl.trans(tile), input_precision=PRECISION)
    if zero is not None:
        steps = tl.load(scale + entry, mask=stored, other=0.0).to(tl.float32)
        zeros = tl.load(zero + entry, mask=stored, other=0.0).to(tl.float32)
        scores = (scores - q_sum[:, None] * zeros[None, :]) * steps[None, :]
    return scores


@triton.jit
def _add_values(
    acc, acc_odd, weights, like, data, scale, zero, offset, entry, stride, stored, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + weights.v; with codes sum_i w_i s_i (c_i - z_i) = ((w s / u).c - (w s / u).z) u, u the largest s here.

    Both terms take the same rounded weights, or their difference would be lost.
    """
    unit = 1.0
    if zero is not None:
        steps = tl.load(scale + entry, mask=stored, other=0.0).to(tl.float32)
        zeros = tl.load(zero + entry, mask=stored, other=0.0).to(tl.float32)
        largest = tl.max(steps, 0)
        unit = tl.where(largest > 0, largest, 1.0)
        weights = weights * (steps / unit)[None, :]
    weights = weights.to(like.dtype)
    if BITS == 4:
        even, odd = _halves(load_rows(data, offset, stride, stored, DIM // 2, WIDTH, True, False), like)
        part = tl.dot(weights, even, input_precision=PRECISION)
        part_odd = tl.dot(weights, odd, input_precision=PRECISION)
    else:
        tile = _rows(data, offset, stride, stored, like, DIM, WIDTH, BITS, UPCAST)
        part = tl.dot(weights, tile, input_precision=PRECISION)
        part_odd = acc_odd
    if zero is not None:
        shift = tl.sum(weights.to(tl.float32) * zeros[None, :], 1)[:, None]
        part = (part - shift) * unit
        part_odd = (part_odd - shift) * unit
    acc += part
    if BITS == 4:
        acc_odd += part_odd
    return acc, acc_odd


@triton.jit
def _store_half(
    out, row, real, acc, total, unit, own, current, half, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    """Write (acc * unit + own * current value) / total to all columns, or to the even or odd ones."""
    step: tl.constexpr = 2 if BITS == 4 else 1
    column = tl.arange(0, WIDTH)
    inside = column < DIM // step
    acc = acc * unit
    if current is not None:
        newest = tl.load(current + column * step + half, mask=inside, other=0.0).to(tl.float32)
        # A value that is not finite must not reach rows whose list does not hold it.
        acc += tl.where((own > 0)[:, None], own[:, None] * newest[None, :], 0.0)
    result = acc / total[:, None]
    target = out + row[:, None] * DIM + (column * step + half)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["stored_pages", "width", "share", "sinks", "recent"])
def attention_kernel(
    query, key, key_scale, key_zero, value, value_scale, value_zero, pages, length, slots, current_key,
    current_value, out, lse,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sp, k_sn, k_sd, v_sb, v_sh, v_sp, v_sn, v_sd, heads, stored_pages, width,
    share, sinks, recent, lists_per_head, scale,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of the FOLD query heads of one list to a share of its pages, with an online softmax.

    Grid (splits, lists, B). out [splits, B, lists * FOLD, DV] and lse [splits, B, lists * FOLD] (None: not wanted) are
    contiguous, as are pages [B, lists, width], scales and zeros [B, heads, stored_pages, PAGE] and the current token
    [B, heads, D or DV]. BITS 0: floating data. `share`: tokens of a list a split takes. scale includes log2(e).
    slots [B, stored_pages, PAGE]: the token in each place, None: in order. WINDOWED: of the tokens only the first
    `sinks` and the last `recent` are read.
    """
    split, line, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lists = tl.num_programs(1)
    head = line // lists_per_head
    member = tl.arange(0, BLOCK_M)
    real_row = member < FOLD
    row = (batch.to(tl.int64) * lists + line) * FOLD + member
    q_at = (line * FOLD + member).to(tl.int64) * q_sh
    q, q_odd = _load_query(query + batch.to(tl.int64) * q_sb, q_at, q_sd, real_row, D, WIDTH, KEY_BITS, UPCAST)
    q_sum = tl.sum(q.to(tl.float32), 1)
    if KEY_BITS == 4:
        q_sum += tl.sum(q_odd.to(tl.float32), 1)
    store = batch.to(tl.int64) * heads + head
    key += batch.to(tl.int64) * k_sb + head.to(tl.int64) * k_sh
    value += batch.to(tl.int64) * v_sb + head.to(tl.int64) * v_sh
    pages += (batch.to(tl.int64) * lists + line) * width
    tokens = tl.load(length + batch)
    key_unit, value_unit = 1.0, 1.0
    if key_scale is not None and key_zero is None:
        key_unit = tl.load(key_scale).to(tl.float32)
    if value_scale is not None and value_zero is None:
        value_unit = tl.load(value_scale).to(tl.float32)
    if current_key is not None:
        k_new, k_new_odd = _load_query(current_key + store * D, member.to(tl.int64) * 0, 1, real_row, D, WIDTH,
                                       KEY_BITS, UPCAST)  # fmt: skip
        own_score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1)
        if KEY_BITS == 4:
            own_score += tl.sum(q_odd.to(tl.float32) * k_new_odd.to(tl.float32), 1)
        current_value += store * DV

    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    own = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, width * PAGE), BLOCK_N):
        flat = start + tl.arange(0, BLOCK_N)
        nth = flat // PAGE
        inside = flat - nth * PAGE
        page = tl.load(pages + nth, mask=nth < width, other=-1).to(tl.int64)
        real = (page >= 0) & (page < stored_pages)
        token = page * PAGE + inside
        if slots is not None:
            token = tl.load(slots + batch.to(tl.int64) * stored_pages * PAGE + token, mask=real, other=-1)
        real = real & (token >= 0) & (token < tokens)
        if WINDOWED:
            real = real & ((token < sinks) | (token >= tokens - recent))
        stored = real
        if current_key is not None:
            stored = real & (token != tokens - 1)
            if slots is not None:
                real = stored
        entry = (store * stored_pages + page) * PAGE + inside
        scores = _key_scores(
            q, q_odd, q_sum, key, key_scale, key_zero, page * k_sp + inside * k_sn, entry, k_sd, stored,
            D, WIDTH, KEY_BITS, PRECISION, UPCAST,
        )  # fmt: skip
        scores *= key_unit
        if current_key is not None:
            scores = tl.where(stored[None, :], scores, own_score[:, None])
        scores = tl.where(real[None, :], scores * scale, NEG_INF)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        if current_key is not None:
            own = own * decay + tl.sum(tl.where(stored[None, :], 0.0, weights), 1)
            weights = tl.where(stored[None, :], weights, 0.0)
        acc, acc_odd = _add_values(
            acc * decay[:, None], acc_odd * decay[:, None], weights, q, value, value_scale, value_zero,
            page * v_sp + inside * v_sn, entry, v_sd, stored, DV, WIDTH_V, VALUE_BITS, PRECISION, UPCAST,
        )  # fmt: skip
    if current_key is not None and slots is not None:
        # No place holds the newest token: the first split brings it in.
        fresh = tl.where((split == 0) & (tokens > 0), own_score * scale, NEG_INF)
        new_top = tl.maximum(top, fresh)
        base = tl.where(new_top == NEG_INF, 0.0, new_top)
        decay, own = tl.exp2(top - base), tl.exp2(fresh - base)
        top = new_top
        total = total * decay + own
        acc = acc * decay[:, None]
        acc_odd = acc_odd * decay[:, None]
    safe = tl.where(total == 0.0, 1.0, total)
    if lse is not None:
        row += tl.cast(split, tl.int64) * tl.num_programs(2) * lists * FOLD
        tl.store(lse + row, tl.where(total == 0.0, NEG_INF, (top + tl.log2(safe)) * LN2), mask=real_row)
    _store_half(out, row, real_row, acc, safe, value_unit, own, current_value, 0, DV, WIDTH_V, VALUE_BITS)
    if VALUE_BITS == 4:
        _store_half(out, row, real_row, acc_odd, safe, value_unit, own, current_value, 1, DV, WIDTH_V, VALUE_BITS)
