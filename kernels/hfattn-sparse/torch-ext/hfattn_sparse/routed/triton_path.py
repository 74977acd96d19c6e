"""Routed attention and its routing on Triton kernels: what runs on the host.

No shape depends on the data and nothing waits for the device, so CUDA graphs can capture a call, and meta tensors can
record it (`launch.recording`).

Forward: every block computes all rows that chose it ("key-block-major"), and writes one partial result per routed pair;
a second kernel computes the own blocks and merges. Each block is thus read once per tile of rows, as dense attention
reads it, where a walk over query blocks would read it again for every handful of rows that share it. The partial
results of one head take Nq * k * Dv numbers; heads go through in chunks, so that this scratch memory stays within
`SCRATCH` times the query, or what one head needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..launch import config, interpreting, launch, target_of
from . import triton_backward, triton_forward, triton_layout, triton_routing
from .triton_common import next_power_of_2
from .triton_tables import Layout

# Scratch memory of partial results, in sizes of the query; never less than one head, or these bytes.
SCRATCH = 2
SCRATCH_BYTES = 256 << 20
# Up to this many queries (decoding) every routed pair is computed on its own.
FEW_ROWS = 16
# Blocks that are ranked in one pass; more take several passes.
MAX_SLOTS = 256
# Programs that keep a large GPU busy; work is split until there are so many. Early blocks are chosen several times as
# often as others, so a split that finds no rows costs less than a block that ends late.
BUSY = 2048
MAX_SPLITS = 16
# Rows of a head are counted and placed in chunks, one program each: many short walks.
CHUNKS = 256
LEAST_CHUNK = 64


def select_routes(
    query: Tensor, key: Tensor, index: Tensor | None, block_size: int, top_k: int, causal: bool
) -> Tensor:
    """As `op.select_routes`. Any `top_k`; up to `MAX_SLOTS` blocks take one pass over the block means."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    width = min(top_k, -(-k_len // block_size))
    make = query.new_empty if index is None else query.new_zeros
    routes = make((batch, heads, q_len, width), dtype=torch.int32)
    if index is not None:
        routes.fill_(-1)
    if not routes.numel():
        return routes
    layout = Layout(index, q_len, k_len, block_size, causal)
    parts, part_scale = _parts(query.dtype)
    means = key.new_empty(batch, kv_heads, parts, layout.blocks.limit, dim)
    _centroids(key, means, layout, part_scale)

    candidates = width - 1 if causal else width
    passes = max(1, -(-candidates // (MAX_SLOTS - 1)))
    bounds = query.new_empty((batch, heads, q_len), dtype=torch.int64) if passes > 1 else None
    column = 0
    for number in range(passes):
        keep = min(MAX_SLOTS - 1, candidates - number * (MAX_SLOTS - 1))
        own = causal and number == 0
        slots = max(2, next_power_of_2(keep + own))
        tile = config("routed_top_blocks", dtype=query.dtype, head_dim=dim, device=query.device)
        tile["BLOCK_M"] = max(16, min(tile["BLOCK_M"], 4096 // slots))
        tiles = layout.query_tiles(tile["BLOCK_M"])
        launch(
            triton_routing.top_blocks_kernel, (tiles.programs, batch * heads),
            query, means, routes, bounds, tiles.table, tiles.count, layout.q_rows, *query.stride(), heads,
            heads // kv_heads, q_len, k_len, tiles.limit, layout.blocks.limit, tiles.programs, width, column, keep,
            BLOCK_SIZE=block_size, HEAD_DIM=dim, BLOCK_D=_padded(dim), SLOTS=slots, PARTS=parts, PART_SCALE=part_scale,
            CAUSAL=causal, OWN=own, BOUNDED=number > 0, STORE_BOUND=passes > 1, HAS_INDEX=layout.has_index,
            UPCAST=interpreting(), **tile,
        )  # fmt: skip
        column += keep + own
    return routes if passes == 1 else _ascending(routes)


def _centroids(key: Tensor, means: Tensor, layout: Layout, part_scale: float) -> None:
    batch, kv_heads, k_len, dim = key.shape
    tile = config("routed_centroids", dtype=key.dtype, head_dim=dim, device=key.device)
    launch(
        triton_routing.centroid_kernel, (layout.blocks.programs, batch * kv_heads),
        key, means, layout.blocks.table, layout.blocks.count, layout.k_rows, *key.stride(), kv_heads, k_len,
        layout.blocks.limit, layout.blocks.programs,
        BLOCK_SIZE=layout.block_size, HEAD_DIM=dim, BLOCK_D=_padded(dim), PARTS=means.shape[2], PART_SCALE=part_scale,
        HAS_INDEX=layout.has_index, **_fitting(tile, layout.block_size),
    )  # fmt: skip


def _parts(dtype: torch.dtype) -> tuple[int, float]:
    """How many numbers of this type stand for an fp32 block mean, and the factor from one to the next."""
    return {torch.float32: (1, 1.0), torch.bfloat16: (3, 1.0), torch.float16: (2, 2048.0)}[dtype]


def _ascending(routes: Tensor) -> Tensor:
    missing = torch.iinfo(torch.int32).max
    routes = torch.where(routes < 0, missing, routes).sort(-1).values
    return torch.where(routes == missing, -1, routes)


class _Pairs:
    """The routes as lists of pairs (see `triton_layout`): `listed`, `has_own`, and by block `pairs` within `ends`."""

    def __init__(self, routes: Tensor, layout: Layout, *, by_block: bool) -> None:
        batch, heads, q_len, width = routes.shape
        if q_len * width >= 1 << 31:
            raise ValueError(
                f"routes have {q_len} x {width} entries per head; the Triton path allows fewer than {1 << 31}. "
                "Split the queries into several calls."
            )
        routes = routes.to(torch.int32).contiguous()
        limit = layout.blocks.limit
        chunk_rows = max(LEAST_CHUNK, next_power_of_2(-(-q_len // CHUNKS)))
        self.width, self.chunks = width, -(-q_len // chunk_rows)
        self.listed = torch.empty_like(routes)
        self.has_own = routes.new_zeros((batch, heads, q_len), dtype=torch.int8)
        counts = routes.new_zeros(batch * heads, limit * self.chunks) if by_block else None
        options = {"dtype": torch.int32, "head_dim": 8, "device": routes.device}
        tile = config("routed_list", **options)
        total = q_len * width
        launch(
            triton_layout.list_kernel, (-(-total // tile["BLOCK"]), batch * heads),
            routes, layout.rows, self.listed, self.has_own, counts, q_len, layout.k_len, heads, width, limit,
            self.chunks, chunk_rows * width,
            BLOCK_SIZE=layout.block_size, CAUSAL=layout.causal, LIST_OWN=not by_block, COUNT=by_block,
            HAS_INDEX=layout.has_index, **tile,
        )  # fmt: skip
        self.pairs = self.ends = None
        if not by_block:
            return
        self.ends = counts.cumsum(1, dtype=torch.int32)
        self.pairs = routes.new_empty(batch * heads, total)
        launch(
            triton_layout.fill_kernel, (self.chunks, batch * heads),
            self.listed, self.ends - counts, self.pairs, total, limit, self.chunks, chunk_rows * width,
            **config("routed_fill", **options),
        )  # fmt: skip


class _Call:
    """Sizes, tables and constants that the kernels of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, block_size: int, causal: bool
    ) -> None:
        self.batch, self.heads, self.q_len, self.dim = query.shape
        self.kv_heads, self.k_len, self.value_dim = key.shape[1], key.shape[2], value.shape[3]
        self.group = self.heads // self.kv_heads
        self.block_size, self.causal = block_size, causal
        self.dtype, self.device = query.dtype, query.device
        self.layout = Layout(index, self.q_len, self.k_len, block_size, causal)
        self.strides = (*query.stride(), *key.stride(), *value.stride())
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        tf32 = tf32 and not target_of(query.device).startswith("gfx")
        self.meta = {
            "BLOCK_SIZE": block_size,
            "HEAD_DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_D": _padded(self.dim),
            "BLOCK_DV": _padded(self.value_dim),
            "HAS_INDEX": self.layout.has_index,
        }
        self.product = {"UPCAST": interpreting(), "PRECISION": "tf32" if tf32 else "ieee"}

    def config(self, kernel: str) -> dict[str, int]:
        """Configuration of a kernel, key tiles no longer than a block."""
        head_dim = max(self.dim, self.value_dim)
        return _fitting(config(kernel, dtype=self.dtype, head_dim=head_dim, device=self.device), self.block_size)

    def head_chunks(self, width: int, bytes_per_pair: int, item_size: int) -> list[tuple[int, int]]:
        """(first, count) of flattened heads whose scratch memory exists at a time."""
        total, per_head = self.batch * self.heads, self.q_len * width * bytes_per_pair
        room = max(SCRATCH_BYTES, SCRATCH * total * self.q_len * self.dim * item_size)
        count = max(1, min(total, room // max(1, per_head)))
        return [(first, min(count, total - first)) for first in range(0, total, count)]

    def splits(self, programs: int, rows: int) -> int:
        """Programs that share a block's tiles of `rows` queries: enough to fill the device, and for popular blocks."""
        return max(1, min(MAX_SPLITS, -(-BUSY // max(1, programs)), -(-self.q_len // rows)))


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, index: Tensor | None, block_size: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse as `op.routed_block_attention`."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not out.numel() or not routes.numel() or not key.shape[2]:
        return out.zero_(), lse.fill_(-math.inf)
    if index is not None:
        out.zero_()
        lse.fill_(-math.inf)
    call = _Call(query, key, value, index, block_size, causal)
    few = call.q_len <= FEW_ROWS
    pairs = _Pairs(routes, call.layout, by_block=not few)
    scale = scale / math.log(2)
    chunks = call.head_chunks(pairs.width, call.value_dim * query.element_size() + 4, query.element_size())
    partial = query.new_empty(chunks[0][1], call.q_len * pairs.width, call.value_dim)
    partial_lse = lse.new_empty(partial.shape[:2])
    tile = call.config("routed_merge")
    tiles = call.layout.query_tiles(tile["BLOCK_M"])
    for first, count in chunks:
        inputs = query, key, value, partial, partial_lse
        (_pair_results if few else _block_results)(call, pairs, inputs, first, count, scale)
        launch(
            triton_forward.merge_kernel, (tiles.programs, count),
            query, key, value, out, lse, partial, partial_lse, pairs.listed, pairs.has_own, tiles.table, tiles.count,
            call.layout.q_rows, call.layout.k_rows, *call.strides, first, call.heads, call.group, call.q_len,
            call.k_len, pairs.width, tiles.limit, tiles.programs, scale,
            OWN=causal and not few, **call.meta, **call.product, **tile,
        )  # fmt: skip
    return out, lse


def _block_results(call: _Call, pairs: _Pairs, inputs: tuple[Tensor, ...], first: int, count: int, scale: float):
    blocks, tile = call.layout.blocks, call.config("routed_partial")
    if call.block_size > tile["BLOCK_N"]:  # a loop over keys inside the loop over rows needs more registers
        tile = call.config("routed_partial_long")
    programs = blocks.programs * count
    launch(
        triton_forward.partial_kernel, (programs, call.splits(programs, tile["BLOCK_M"])),
        *inputs, pairs.pairs, pairs.ends, blocks.table, blocks.count, call.layout.k_rows, *call.strides, first, count,
        call.heads, call.group, call.q_len, call.k_len, pairs.width, blocks.limit, pairs.chunks, blocks.programs, scale,
        **call.meta, **call.product, **tile,
    )  # fmt: skip


def _pair_results(call: _Call, pairs: _Pairs, inputs: tuple[Tensor, ...], first: int, count: int, scale: float):
    blocks = call.layout.blocks
    launch(
        triton_forward.pair_kernel, (call.q_len * pairs.width, count),
        *inputs, pairs.listed, call.layout.rows, blocks.table, call.layout.k_rows, *call.strides, first, call.heads,
        call.group, call.q_len, call.k_len, pairs.width, blocks.limit, scale,
        CAUSAL=call.causal, **call.meta, **call.config("routed_pair"),
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, routes: Tensor,
    index: Tensor | None, out: Tensor, lse: Tensor, block_size: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, contiguous.

    Those of key and value are always deterministic. That of the query takes atomic additions, or, under
    `torch.use_deterministic_algorithms(True)`, one number per routed pair and dimension, as the forward does.
    """
    blank = torch.empty if index is None else torch.zeros
    grads = [blank(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    if not out.numel() or not routes.numel() or not key.shape[2]:
        return tuple(grad.zero_() for grad in grads)
    call = _Call(query, key, value, index, block_size, causal)
    pairs = _Pairs(routes, call.layout, by_block=True)
    delta = _delta(call, grad_out, grad_lse, out)
    inputs = query, key, value, grad_out, lse.contiguous(), delta
    strides = (*call.strides, *grad_out.stride())
    atomic = not torch.are_deterministic_algorithms_enabled()
    sums = query.new_zeros(query.shape, dtype=torch.float32) if atomic else None
    _grad_key_value(call, pairs, inputs, strides, scale, grads[1:], sums)
    _grad_query(call, pairs, inputs, strides, scale, grads[0], sums)
    return tuple(grads)


def _delta(call: _Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    tile = call.config("routed_delta")
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    launch(
        triton_backward.delta_kernel, (-(-call.q_len // tile["BLOCK_M"]), call.batch * call.heads),
        out, grad_out, grad_lse, delta, *out.stride(), *grad_out.stride(), *lse_strides, call.heads, call.q_len,
        VALUE_DIM=call.value_dim, BLOCK_DV=_padded(call.value_dim), GRAD_LSE=grad_lse is not None, **tile,
    )  # fmt: skip
    return delta


def _grad_key_value(
    call: _Call, pairs: _Pairs, inputs: tuple[Tensor, ...], strides: tuple[int, ...], scale: float, grads: list[Tensor],
    sums: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradients of key and value; add the share of listed pairs in that of the query to `sums`."""
    # Rows looked up in tables need registers that the larger tile does not leave.
    tile = call.config("routed_grad_kv_indexed" if call.layout.has_index else "routed_grad_kv")
    blocks, kv_total = call.layout.blocks, call.batch * call.kv_heads
    inside = -(-call.block_size // tile["BLOCK_N"])
    splits = call.splits(blocks.programs * kv_total * inside, tile["BLOCK_M"])
    shares = grads
    if splits > 1:
        blank = torch.zeros if call.layout.has_index else torch.empty
        shares = [blank((splits, *g.shape), dtype=torch.float32, device=g.device) for g in grads]
    launch(
        triton_backward.grad_kv_kernel, (blocks.programs * kv_total, splits, inside),
        *inputs, *shares, sums, pairs.pairs, pairs.ends, pairs.has_own, blocks.table, blocks.count, call.layout.q_rows,
        call.layout.k_rows, *strides, kv_total, call.kv_heads, call.group, call.q_len, call.k_len, pairs.width,
        blocks.limit, pairs.chunks, blocks.programs, scale, scale / math.log(2),
        OWN=call.causal, ATOMIC=sums is not None, **call.meta, **call.product, **tile,
    )  # fmt: skip
    if splits > 1:
        for grad, share in zip(grads, shares, strict=True):
            grad.copy_(share.sum(0))


def _grad_query(
    call: _Call, pairs: _Pairs, inputs: tuple[Tensor, ...], strides: tuple[int, ...], scale: float, grad: Tensor,
    sums: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradient of the query from `sums`, or from one share for every pair."""
    tile, blocks = call.config("routed_grad_query"), call.layout.blocks
    tiles = call.layout.query_tiles(tile["BLOCK_M"])
    chunks = [(0, call.batch * call.heads)]
    shares = sums
    if sums is None:
        chunks = call.head_chunks(pairs.width, 4 * call.dim, grad.element_size())
        shares = grad.new_empty((chunks[0][1], call.q_len * pairs.width, call.dim), dtype=torch.float32)
    for first, count in chunks:
        if sums is None:
            pair_tile, programs = call.config("routed_grad_pair"), blocks.programs * count
            launch(
                triton_backward.grad_pair_kernel, (programs, call.splits(programs, pair_tile["BLOCK_M"])),
                *inputs, shares, pairs.pairs, pairs.ends, blocks.table, blocks.count, call.layout.k_rows, *strides,
                first, count, call.heads, call.group, call.q_len, call.k_len, pairs.width, blocks.limit, pairs.chunks,
                blocks.programs, scale / math.log(2),
                **call.meta, **call.product, **pair_tile,
            )  # fmt: skip
        launch(
            triton_backward.grad_query_kernel, (tiles.programs, count),
            *inputs, grad, shares, pairs.listed, pairs.has_own, tiles.table, tiles.count, call.layout.q_rows,
            call.layout.k_rows, *strides, first, call.heads, call.group, call.q_len, call.k_len, pairs.width,
            tiles.limit, tiles.programs, scale, scale / math.log(2),
            OWN=call.causal, ATOMIC=sums is not None, **call.meta, **call.product, **tile,
        )  # fmt: skip


def _padded(dim: int) -> int:
    """Columns of a tile for this head dimension: what tensor cores take."""
    return max(16, next_power_of_2(dim))


def _fitting(tile: dict[str, int], block_size: int) -> dict[str, int]:
    """The configuration with key tiles no longer than a block."""
    return (
        {**tile, "BLOCK_N": min(tile["BLOCK_N"], max(16, next_power_of_2(block_size)))} if "BLOCK_N" in tile else tile
    )
