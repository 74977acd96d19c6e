"""What the Triton kernels of block-sparse attention share: where a tile lies, which keys it reads, how rows load.

Names in all kernels: `row` and `key` count inside a sequence, `slot` counts inside a batch row sorted by sequence (see
`device_sequences`), `place` is the row of the tensor. Without a table of tiles the three are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A block id that no list holds: fills the unused places of a sorted list.
UNUSED = tl.constexpr(2**31 - 1)
NEG_INF = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Block ids that are counted at once.
CHUNK = tl.constexpr(64)


@triton.jit
def describe(tiles, batch, tile, slots, q_len, k_len):
    """Ordinals of a tile's block and sequence, and q_first, q_length, k_first, k_length of the sequence.

    tiles: int32 [B, 8, slots], the fields of `device_sequences.Tiles` after `count`; None = each row is one sequence.
    """
    block, number, q_first, q_length, k_first, k_length = tile, 0, 0, q_len, 0, k_len
    if tiles is not None:
        at = tiles + batch.to(tl.int64) * 8 * slots + tile
        block = tl.load(at + 2 * slots)
        number = tl.load(at + 3 * slots)
        q_first = tl.load(at + 4 * slots)
        q_length = tl.load(at + 5 * slots)
        k_first = tl.load(at + 6 * slots)
        k_length = tl.load(at + 7 * slots)
    return block, number, q_first, q_length, k_first, k_length


@triton.jit
def query_rows(block, sub, q_length, block_q, FOLD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of part `sub` of a query block, with the `FOLD` heads of a group one after the other.

    Returns row [BLOCK_M], member [BLOCK_M] (head inside the group), real [BLOCK_M], and the first and last real row.
    """
    flat = sub * BLOCK_M + tl.arange(0, BLOCK_M)
    start = block * block_q
    low = start
    high = tl.minimum(start + block_q, q_length) - 1
    if FOLD == 1:
        row = start + flat
        member = tl.zeros([BLOCK_M], tl.int32)
        low = start + sub * BLOCK_M
        high = tl.minimum(high, low + BLOCK_M - 1)
        real = row <= high
    else:
        member = flat // block_q
        row = start + flat - member * block_q
        real = (member < FOLD) & (row <= high)
    return row, member, real, low, high


@triton.jit
def places(table, batch, length, slot, real):
    """Tensor rows behind slots: `table` int32 [B, length], or None where they are the same."""
    place = slot
    if table is not None:
        place = tl.load(table + batch.to(tl.int64) * length + slot, mask=real, other=0)
    return place


@triton.jit
def load_rows(
    base, offset, stride, real, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """Tile [rows, WIDTH] at int64 row offsets; zeros where a row is not `real` (if MASKED) and from column DIM on."""
    column = tl.arange(0, WIDTH)
    at = base + offset[:, None] + column.to(tl.int64)[None, :] * stride
    if MASKED:
        if DIM == WIDTH:
            tile = tl.load(at, mask=real[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=real[:, None] & (column < DIM)[None, :], other=0.0)
    else:
        if DIM == WIDTH:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(column < DIM)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(base, offset, tile, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile [rows, WIDTH] whose columns are contiguous in memory, in the type of `base`."""
    column = tl.arange(0, WIDTH)
    mask = real[:, None] & (column < DIM)[None, :]
    tl.store(base + offset[:, None] + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def finite(tile):
    """Where a tile is neither NaN nor infinite."""
    return tl.abs(tile.to(tl.float32)) < float("inf")


@triton.jit
def count_below(ids, length, bound):
    """How many of the `length` block ids at `ids` are smaller than `bound`."""
    found = 0
    for start in range(0, length, CHUNK):
        at = start + tl.arange(0, CHUNK)
        block = tl.load(ids + at, mask=at < length, other=UNUSED)
        found += tl.sum((block < bound).to(tl.int32), 0)
    return found


@triton.jit
def list_of(lists, batch, number, head, block, rows, heads, q_blocks, length, share, PER_SEQUENCE: tl.constexpr):
    """Start of the sorted list of a query block; lists [rows, heads, q_blocks, length], a head for `share` heads."""
    row = batch
    if PER_SEQUENCE:
        row = number
    row = tl.minimum(row, rows - 1)
    return lists + ((row.to(tl.int64) * heads + head // share) * q_blocks + block) * length


@triton.jit
def key_tiles(ids, length, low, high, k_length, block_k, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """How the keys that a sorted list names fall into tiles of BLOCK_N, counted along the list.

    low, high: positions of the first and last query.

    Returns the number of tiles that every query sees wholly, of all tiles, and of listed blocks with a visible key.
    """
    all_see, some_see = k_length, k_length
    if CAUSAL:
        all_see = tl.maximum(tl.minimum(k_length, low + 1), 0)
        some_see = tl.maximum(tl.minimum(k_length, high + 1), 0)
    whole = count_below(ids, length, all_see // block_k)
    listed = count_below(ids, length, (some_see + block_k - 1) // block_k)
    # Lists ascend: only the block after the whole ones can be seen in part by all, only the last listed one by some.
    split = tl.load(ids + whole, mask=whole < listed, other=UNUSED)
    part = tl.where(whole < listed, tl.maximum(all_see - split.to(tl.int64) * block_k, 0), 0).to(tl.int32)
    last = tl.load(ids + listed - 1, mask=listed > 0, other=0)
    keys = tl.where(listed > 0, (listed - 1) * block_k + tl.minimum(some_see - last * block_k, block_k), 0)
    total = (keys + BLOCK_N - 1) // BLOCK_N
    return tl.minimum((whole * block_k + part) // BLOCK_N, total), total, listed


@triton.jit
def listed_tokens(ids, tile, listed, block, beyond, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Tokens of part `tile` of the blocks listed at `ids`, [WIDTH]; `beyond` after the last of them.

    EVEN: a tile lies inside one block, so its tokens are consecutive.
    """
    if EVEN:
        first = tile * WIDTH
        nth = first // block
        token = tl.load(ids + nth) * block + first - nth * block + tl.arange(0, WIDTH)
    else:
        flat = tile * WIDTH + tl.arange(0, WIDTH)
        nth = flat // block
        number = tl.load(ids + nth, mask=nth < listed, other=0)
        token = tl.where(nth < listed, number * block + flat - nth * block, beyond)
    return token


@triton.jit
def load_bias(bias, place, real):
    """Bias of keys in units of log 2, and the keys that it does not hide."""
    value = tl.load(bias + place, mask=real, other=NEG_INF)
    return value * LOG2E, real & (value != NEG_INF)
