"""The kernels of block selection."""

import triton
import triton.language as tl

# Integer keys of hidden and of forced blocks: below and above that of every finite score.
_HIDDEN: tl.constexpr = tl.constexpr(-2147483648)
_FORCED: tl.constexpr = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["length", "tiles"])
def block_means(
    x, means, rows, first, count, column,
    stride_xb, stride_xh, stride_xn, stride_xd,
    stride_mb, stride_mh, stride_mn, stride_md,
    length, tiles, block,
    DIM: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Mean of the tokens of one tile and head, in fp32. Without `first` tile t is tokens `t * block` and on."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if first is None:
        start, place = tile * block, tile
        size = tl.minimum(block, length - start)
    else:
        entry = batch.to(tl.int64) * tiles + tile
        start, size, place = tl.load(first + entry), tl.load(count + entry), tl.load(column + entry)
        size = tl.where(place < 0, 0, size)
    dims = tl.arange(0, WIDE)
    x += batch.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    total = tl.zeros([WIDE], tl.float32)
    for done in range(0, size, CHUNK):
        slots = done + tl.arange(0, CHUNK)
        real = slots < size
        token = start + slots
        if rows is not None:
            token = tl.load(rows + batch.to(tl.int64) * length + token, mask=real, other=0)
        here = token.to(tl.int64)[:, None] * stride_xn + dims[None, :] * stride_xd
        part = tl.load(x + here, mask=real[:, None] & (dims < DIM)[None, :], other=0.0)  # [CHUNK, WIDE]
        total += tl.sum(part.to(tl.float32), 0)
    means += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh + place.to(tl.int64) * stride_mn
    tl.store(means + dims * stride_md, total / tl.maximum(size, 1), mask=dims < tl.where(place < 0, 0, DIM))


@triton.jit
def _row(table, batch, tile, tiles, q_len, k_len, block_q, block_k, local, CAUSAL: tl.constexpr):
    """Of query tile(s) `tile`: ordinal in the sequence, sequence, first key column, visible blocks, local range."""
    if table is None:
        block_id, number, column = tile, tile * 0, tile * 0
        q_size, k_size = tile * 0 + q_len, tl.where(tile < tiles, k_len, 0)
    else:
        entry = table + batch.to(tl.int64) * 5 * tiles + tile
        real = tile < tiles
        block_id = tl.load(entry, mask=real, other=0)
        number = tl.load(entry + tiles, mask=real, other=0)
        q_size = tl.load(entry + 2 * tiles, mask=real, other=0)
        k_size = tl.load(entry + 3 * tiles, mask=real, other=0)
        column = tl.load(entry + 4 * tiles, mask=real, other=0)
    visible = (k_size + block_k - 1) // block_k
    first = block_id * block_q + k_size - q_size
    last = tl.minimum(block_id * block_q + block_q, q_size) - 1 + k_size - q_size
    own = tl.maximum(last, 0) // block_k
    if CAUSAL:
        visible = tl.where(last < 0, 0, tl.minimum(visible, own + 1))
        high = own
    else:
        high = own + local - 1
    low = tl.maximum(first, 0) // block_k - (local - 1)
    # Without local blocks the range is empty.
    high = tl.where(local > 0, high, low - 1)
    return block_id, number, column, visible, low, high


@triton.jit
def _tame(score):
    """What is not finite counts as the largest or smallest score."""
    score = tl.where(score == score, score, -3e38)
    return tl.minimum(tl.maximum(score, -3e38), 3e38)


@triton.jit
def _keys(score, block, visible, low, high, sinks):
    """Integers in the order of the scores, forced blocks above and hidden ones below all others."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    # Negative floats order backwards as integers.
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where((block < sinks) | ((block >= low) & (block <= high)), _FORCED, key)
    return tl.where(block < visible, key, _HIDDEN)


@triton.jit
def _goal(amount, units, visible, RULE: tl.constexpr):
    """What the chosen blocks have to reach: a number of blocks, or a sum of weights."""
    if RULE == 0:
        goal = tl.minimum(visible, units).to(tl.float32)
    elif RULE == 1:
        goal = ((visible.to(tl.int64) * units + 999999) // 1000000).to(tl.float32)
    elif RULE == 2:
        goal = tl.minimum(visible, 1).to(tl.float32)
    else:
        # All of them, whatever their weights sum to in fp32.
        goal = tl.where(amount < 1.0, amount, 2.0) + visible.to(tl.float32) * 0
    return goal


@triton.jit
def _measure(key, weight, taken, RULE: tl.constexpr):
    """Number or weight of the visible blocks that are taken, of every row."""
    taken &= key != _HIDDEN
    return tl.sum(tl.where(taken, weight if RULE == 3 else 1.0, 0.0), 1)


@triton.jit(do_not_specialize=["q_len", "k_len", "tiles", "columns", "q_blocks", "width", "blocks", "units"])
def choose_blocks(
    q_means, k_means, lists, table,
    amount, units, scale, q_len, k_len, tiles, columns, q_blocks, width, blocks, block_q, block_k, sinks, local, group,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores and rule of ROWS query tiles, all their key blocks at once.

    The last block that is taken, in the order of `_keys` and among equals of the block number, is found bit by bit from
    the top: the largest key for which all blocks from it on reach the goal. That needs sums over the row, no sorting.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block_id, number, column, visible, low, high = _row(
        table, batch, tile, tiles, q_len, k_len, block_q, block_k, local, CAUSAL
    )
    block = tl.arange(0, COLUMNS)
    q_means += (batch.to(tl.int64) * heads + head) * tiles * DIM
    k_means += (batch.to(tl.int64) * (heads // group) + head // group) * DIM * columns
    key_column = block + (tl.sum(column, 0) if PACKED else 0)
    score = tl.zeros([ROWS, COLUMNS], tl.float32)
    for d in range(DIM):
        query = tl.load(q_means + tile.to(tl.int64) * DIM + d, mask=visible > 0, other=0.0)
        mean = tl.load(k_means + d * columns + key_column, mask=(block < blocks) & (key_column < columns), other=0.0)
        score += query[:, None] * mean[None, :]
    score = _tame(score * scale)
    key = _keys(score, block[None, :], visible[:, None], low[:, None], high[:, None], sinks)
    seen = key != _HIDDEN
    weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    if RULE >= 2:
        top = tl.max(tl.where(seen, score, -3.4e38), 1)
        weight = tl.where(seen, tl.exp(tl.where(seen, score - top[:, None], 0.0)), 0.0)
        weight = weight / tl.maximum(tl.sum(weight, 1), 1.2e-38)[:, None]

    goal = _goal(amount, units, visible, RULE)
    last = tl.where(_measure(key, weight, key >= 0, RULE) >= goal, 0, _HIDDEN)
    step = 1 << 30
    for _ in range(31):
        tried = last | step
        last = tl.where(_measure(key, weight, key >= tried[:, None], RULE) >= goal, tried, last)
        step = step >> 1
    number_of_last = tl.zeros([ROWS], tl.int32)
    step = COLUMNS // 2
    while step > 0:
        tried = number_of_last | step
        taken = (key > last[:, None]) | ((key == last[:, None]) & (block[None, :] >= tried[:, None]))
        number_of_last = tl.where(_measure(key, weight, taken, RULE) >= goal, tried, number_of_last)
        step = step >> 1
    chosen = (key > last[:, None]) | ((key == last[:, None]) & (block[None, :] >= number_of_last[:, None]))
    chosen = (chosen | (key == _FORCED)) & seen
    if RULE == 2:
        chosen |= (weight >= amount) & seen

    row = (number if PACKED else tl.zeros([ROWS], tl.int32) + batch).to(tl.int64)
    # A dead tile (no visible block) of an index says nothing about where its list would be.
    alive = (tile < tiles) & ((table is None) | (visible > 0))
    lists += ((row * heads + head) * q_blocks + block_id) * width
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    wanted = alive[:, None] & chosen & (place < width)
    numbers = tl.broadcast_to(block[None, :], [ROWS, COLUMNS])
    tl.store(lists[:, None] + place, numbers, mask=wanted)
    rest = tl.sum(chosen.to(tl.int32), 1)
    empty = alive[:, None] & (block[None, :] >= rest[:, None]) & (block[None, :] < width)
    tl.store(lists[:, None] + block[None, :], numbers * 0 - 1, mask=empty)


@triton.jit
def _measure_pieces(
    scores, blocks, visible, low, high, sinks, top, total, last, from_block, RULE: tl.constexpr, COLUMNS: tl.constexpr
):
    """`_measure` of a row that lies in memory: blocks above the key `last`, and equal ones from `from_block` on."""
    reached = tl.zeros([1], tl.float32)
    for start in range(0, blocks, COLUMNS):
        block = start + tl.arange(0, COLUMNS)[None, :]
        score = tl.load(scores + block, mask=block < blocks, other=0.0)
        key = _keys(score, block, visible, low, high, sinks)
        weight = tl.exp(tl.minimum(score - top, 0.0)) / total
        reached += _measure(key, weight, (key > last) | ((key == last) & (block >= from_block)), RULE)
    return tl.sum(reached, 0)


@triton.jit(do_not_specialize=["q_len", "k_len", "tiles", "columns", "q_blocks", "width", "blocks", "units", "rows"])
def choose_blocks_in_pieces(
    q_means, k_means, lists, table,
    amount, units, scale, q_len, k_len, tiles, columns, q_blocks, width, blocks, block_q, block_k, sinks, local, group,
    heads, rows, programs, scratch,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`choose_blocks` for rows of any length, one at a time: a program keeps the scores of its row in `scratch`."""
    scores = scratch + tl.program_id(0).to(tl.int64) * blocks
    for turn in range(0, tl.cdiv(rows - tl.program_id(0), programs)):
        row = tl.program_id(0) + turn * programs
        tile, head, batch = row % tiles, row // tiles % heads, row // tiles // heads
        block_id, number, column, visible, low, high = _row(
            table, batch, tile, tiles, q_len, k_len, block_q, block_k, local, CAUSAL
        )
        if not PACKED:
            column = column * 0
        query = q_means + row.to(tl.int64) * DIM
        keys = k_means + (batch.to(tl.int64) * (heads // group) + head // group) * DIM * columns + column
        top = tl.full([1], -3.4e38, tl.float32)
        for start in range(0, blocks, COLUMNS):
            block = start + tl.arange(0, COLUMNS)[None, :]
            score = tl.zeros([1, COLUMNS], tl.float32)
            for d in range(DIM):
                score += tl.load(query + d) * tl.load(keys + d * columns + block, mask=block < visible, other=0.0)
            score = _tame(score * scale)
            tl.store(scores + block, score, mask=block < blocks)
            top = tl.maximum(top, tl.max(tl.where(block < visible, score, -3.4e38), 1))
        # Other threads read what this one wrote.
        tl.debug_barrier()
        top = tl.max(top, 0)
        total = tl.zeros([1], tl.float32)
        if RULE >= 2:
            for start in range(0, blocks, COLUMNS):
                block = start + tl.arange(0, COLUMNS)[None, :]
                score = tl.load(scores + block, mask=block < visible, other=-3.4e38)
                total += tl.sum(tl.where(block < visible, tl.exp(score - top), 0.0), 1)
        total = tl.maximum(tl.sum(total, 0), 1.2e-38)

        goal = _goal(amount, units, visible, RULE)
        last = tl.full([], _HIDDEN, tl.int32)
        # The first step is from the lowest key to 0, the others set one bit each.
        tried = last * 0
        step = 1 << 30
        for _ in range(32):
            reached = _measure_pieces(scores, blocks, visible, low, high, sinks, top, total, tried, 0, RULE, COLUMNS)
            last = tl.where(reached >= goal, tried, last)
            tried = last | step
            step = step >> 1
        number_of_last = last * 0
        for bit in range(31):
            tried = number_of_last | (1 << (30 - bit))
            if tried < blocks:
                reached = _measure_pieces(
                    scores, blocks, visible, low, high, sinks, top, total, last, tried, RULE, COLUMNS
                )
                number_of_last = tl.where(reached >= goal, tried, number_of_last)

        alive = (table is None) | (visible > 0)
        list_row = (number if PACKED else batch).to(tl.int64)
        target = lists + ((list_row * heads + head) * q_blocks + block_id) * width
        before = tl.zeros([1], tl.int32)
        for start in range(0, blocks, COLUMNS):
            block = start + tl.arange(0, COLUMNS)[None, :]
            score = tl.load(scores + block, mask=block < blocks, other=0.0)
            key = _keys(score, block, visible, low, high, sinks)
            chosen = (key > last) | ((key == last) & (block >= number_of_last)) | (key == _FORCED)
            if RULE == 2:
                chosen |= tl.exp(tl.minimum(score - top, 0.0)) / total >= amount
            chosen &= key != _HIDDEN
            place = tl.cumsum(chosen.to(tl.int32), 1) - 1 + before[:, None]
            tl.store(target + place, block, mask=chosen & (place < width) & alive)
            before += tl.sum(chosen.to(tl.int32), 1)
        for start in range(0, width, COLUMNS):
            place = start + tl.arange(0, COLUMNS)[None, :]
            tl.store(target + place, place * 0 - 1, mask=(place >= before[:, None]) & (place < width) & alive)
        # The next row overwrites the scores.
        tl.debug_barrier()
