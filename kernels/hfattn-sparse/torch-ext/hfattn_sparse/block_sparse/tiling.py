"""How a block-sparse pattern becomes chunks of equal tiles, shared by the torch forward and backward.

A *tile* is one query block of one head together with the key blocks it reads. Tiles that read the same number of key
blocks are batched into *chunks*, so that no padding is ever computed. Everything here is small integer work: it is
redone in every call, costs well under a millisecond, and keeps no state between calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Shapes of one call: `q_len` rows attend to `k_len` keys, the last row sits at the last key (bottom-right)."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    causal: bool

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q_heads // self.kv_heads

    @property
    def key_blocks(self) -> int:
        return -(-self.k_len // self.block_k)


@dataclass(frozen=True)
class Chunk:
    """`n` tiles that read `c` key blocks each.

    Attributes:
        tiles: [n] tile numbers, ascending; `span` is the same as a slice where they are consecutive, else None.
        at: where these tiles stand in the order of their plan.
        local: [n, c] key block ids, ascending.
        rows: [n, c] the same blocks as rows of the flattened [B * Hkv * key_blocks] block table.
        visible: [n | 1, e * block_k, tile_rows], 1 where a row sees a key of the last e blocks, else 0; None = all 1.
        diagonal: there is one edge block, and row r of every tile sees its keys up to number r.
    """

    tiles: Tensor
    span: slice | None
    at: slice
    local: Tensor
    rows: Tensor
    visible: Tensor | None
    diagonal: bool = False

    @property
    def edge(self) -> int:
        """Trailing keys that need a mask."""
        return 0 if self.visible is None else self.visible.shape[1]

    def pieces(self, blocks: int, block_k: int) -> Iterator[Chunk]:
        """Split the key axis into pieces of at most `blocks` key blocks each."""
        total = self.local.shape[1]
        if total <= blocks:
            yield self
            return
        first_edge = total - self.edge // block_k
        for start in range(0, total, blocks):
            stop = min(start + blocks, total)
            visible = None
            if stop > first_edge:
                lo, hi = (max(start, first_edge) - first_edge) * block_k, (stop - first_edge) * block_k
                visible = self.visible[:, lo:hi]
            yield replace(self, local=self.local[:, start:stop], rows=self.rows[:, start:stop], visible=visible)


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a run of equal query blocks that read anything.

    Tiles are numbered over [B, heads, blocks]; `heads` are key heads when the query heads of a group share their
    pattern (`fold` = group size, a tile then holds the rows of the whole group), else query heads (`fold` = 1).

    Attributes:
        block_rows, first_row, blocks: rows of a query block, first query row, and query blocks of the run.
        tiles: [t] tile numbers, in the order in which they are processed: by `counts`, then `edges`.
        local: [t, M] the key blocks of every tile, ascending, the first `counts` of them valid.
        counts: [t] key blocks of every tile, >= 1.
        edges: [t] how many of them, the last ones, need a mask.
        prepared: what a path has worked out from the plan and wants to find again.
    """

    geometry: Geometry
    fold: int
    block_rows: int
    first_row: int
    blocks: int
    tiles: Tensor
    local: Tensor
    counts: Tensor
    edges: Tensor
    prepared: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def heads(self) -> int:
        return self.geometry.q_heads // self.fold

    @property
    def tile_rows(self) -> int:
        return self.block_rows * self.fold

    @property
    def num_tiles(self) -> int:
        return self.geometry.batch * self.heads * self.blocks

    @property
    def work(self) -> int:
        """Key blocks read by all tiles together."""
        return int(self.counts.sum())

    @property
    def scores(self) -> int:
        """Scores computed by all tiles together."""
        return self.work * self.geometry.block_k * self.tile_rows

    def head_rows(self, heads: int) -> Tensor:
        """[t] row of every tile in a [B * heads] table, where `heads` divides the plan's heads."""
        pairs = self.tiles // self.blocks
        return pairs // self.heads * heads + pairs % self.heads // (self.heads // heads)

    def subset(self, keep: Tensor) -> TilePlan:
        """The tiles where `keep` [t] is true."""
        fields = ("tiles", "local", "counts", "edges")
        return replace(self, **{name: getattr(self, name)[keep] for name in fields})

    def sorted(self) -> TilePlan:
        """In processing order; ties keep their order."""
        return self.subset((self.counts * (self.geometry.key_blocks + 1) + self.edges).argsort(stable=True))

    def split_edges(self) -> tuple[TilePlan, TilePlan]:
        """The blocks that all rows of their tile see in full, and the others, as two plans."""
        plan = self.subset(self.tiles.argsort())
        inner = plan.counts - plan.edges
        columns = torch.arange(int(self.edges.max()) if len(self.edges) else 0, device=self.tiles.device)
        last = plan.local.gather(1, (inner[:, None] + columns).clamp_(max=self.local.shape[1] - 1))
        full = replace(plan, counts=inner, edges=torch.zeros_like(inner)).subset(inner > 0)
        return full.sorted(), replace(plan, local=last, counts=plan.edges).subset(plan.edges > 0).sorted()

    def chunks(self, max_scores: int, max_keys: int, dtype: torch.dtype) -> Iterator[Chunk]:
        """Chunks of at most `max_scores` scores and `max_keys` gathered keys, or of one tile; masks in `dtype`."""
        edges, numbers, offsets = self.edges.tolist(), self.tiles.tolist(), self._edge_offsets()
        base = self.head_rows(self.geometry.kv_heads)[:, None] * self.geometry.key_blocks
        masks: dict[tuple, Tensor] = {}
        start = 0
        widths, lengths = self.counts.unique_consecutive(return_counts=True)
        for width, length in zip(widths.tolist(), lengths.tolist(), strict=True):
            keys = width * self.geometry.block_k
            step = max(1, min(max_scores // (keys * self.tile_rows), max_keys // keys))
            # Equal parts: a nearly empty last chunk would pay the full price of its calls.
            step = -(-length // -(-length // step))
            local = self.local[start : start + length, :width].contiguous()
            rows = local + base[start : start + length]
            for local_part, rows_part in zip(local.split(step), rows.split(step), strict=True):
                at = slice(start, start + len(local_part))
                first, last = numbers[start], numbers[at.stop - 1] + 1
                span = slice(first, last) if last - first == len(local_part) else None
                edge = max(edges[at])
                seen = {tuple(row[len(row) - edge :]) for row in offsets[at]} if edge else set()
                visible = self._visible(seen.pop(), masks, dtype) if len(seen) == 1 else None
                diagonal = visible is not None and visible is masks.get((0,)) and self.geometry.causal
                if seen:
                    begin = torch.tensor([row[len(row) - edge :] for row in offsets[at]], device=self.tiles.device)
                    visible = self._compare(begin).to(dtype)
                yield Chunk(self.tiles[at], span, at, local_part, rows_part, visible, diagonal)
                start = at.stop

    def _edge_offsets(self) -> list[list[int]]:
        """[t, e] where the last blocks of every tile start: relative to its first row, or to the last key + 1."""
        geometry, edge = self.geometry, int(self.edges.max()) if len(self.edges) else 0
        columns = self.counts[:, None] - edge + torch.arange(edge, device=self.tiles.device)
        begin = self.local.gather(1, columns.clamp_(min=0)) * geometry.block_k - geometry.k_len
        if geometry.causal:
            first = self.first_row + self.tiles % self.blocks * self.block_rows - geometry.q_len
            begin -= first[:, None]
        return begin.tolist()

    def _visible(self, begin: tuple, masks: dict[tuple, Tensor], dtype: torch.dtype) -> Tensor:
        """The mask [1, e * block_k, tile_rows] that tiles with the same `begin` share."""
        if begin not in masks:
            masks[begin] = self._compare(torch.tensor([begin], device=self.tiles.device)).to(dtype)
        return masks[begin]

    def _compare(self, begin: Tensor) -> Tensor:
        """begin [n, e] of `_edge_offsets` -> bool [n, e * block_k, tile_rows]."""
        keys = begin[:, :, None] + torch.arange(self.geometry.block_k, device=begin.device)
        limit = torch.arange(self.block_rows, device=begin.device)
        # Without causality only keys past the end are hidden: the same comparison against -1.
        limit = limit.repeat(self.fold) if self.geometry.causal else limit.new_full((self.tile_rows,), -1)
        return keys.flatten(1)[:, :, None] <= limit


def row_runs(q_len: int, block_q: int) -> Iterator[tuple[slice, slice, int]]:
    """(rows, tile columns, rows per tile) of the full query blocks, then of the partial last one."""
    full = q_len // block_q
    if full:
        yield slice(0, full * block_q), slice(0, full), block_q
    if q_len % block_q:
        yield slice(full * block_q, q_len), slice(full, full + 1), q_len % block_q


def plan_tiles(indices: Tensor, geometry: Geometry, first_row: int, block_rows: int, *, fold: bool) -> TilePlan:
    """Sort, deduplicate and prune the pattern of a run of query blocks.

    Args:
        indices: int [B | 1, Hq | Hkv | 1, blocks, M], padded with negative numbers.
        first_row: first query row of the run; every block of it has `block_rows` rows.
        fold: whether the rows of a group may share a tile where the pattern allows it.
    """
    blocks, none, block_k = indices.shape[2], geometry.key_blocks, geometry.block_k
    ids = indices.long()
    first = torch.arange(blocks, device=ids.device)[:, None] * block_rows + (
        first_row + geometry.k_len - geometry.q_len
    )
    keep = ids >= 0
    if geometry.causal:
        keep &= ids * block_k <= first + (block_rows - 1)
    ids = torch.where(keep, ids, none).sort(-1).values
    twice = ids[..., 1:] == ids[..., :-1]
    if bool((twice & (ids[..., 1:] < none)).any()):
        ids[..., 1:].masked_fill_(twice, none)
        ids = ids.sort(-1).values
    real = ids < none
    counts = real.sum(-1)
    if geometry.causal:
        edges = (real & ((ids + 1) * block_k - 1 > first)).sum(-1)
    else:
        edges = ((ids == none - 1) & bool(geometry.k_len % block_k)).sum(-1)

    group = geometry.group
    shared = fold and (ids.shape[1] == 1 or ids.shape[1] == geometry.kv_heads)
    heads = geometry.kv_heads if shared else geometry.q_heads
    if ids.shape[1] not in (1, heads):
        ids, counts, edges = (x.repeat_interleave(group, 1) for x in (ids, counts, edges))
    lead = (geometry.batch, heads, blocks)
    counts, edges = counts.expand(lead).flatten(), edges.expand(lead).flatten()
    tiles = torch.arange(counts.numel(), device=ids.device)
    local = ids.expand(*lead, -1).flatten(0, 2)
    plan = TilePlan(geometry, group if shared else 1, block_rows, first_row, blocks, tiles, local, counts, edges)
    return plan.subset(counts > 0).sorted()


class Workspace:
    """Named scratch tensors that live for one call.

    Fresh memory of this size costs a page fault every 4 KiB: more than the arithmetic that fills it.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; it shares memory with the last one of the same name."""
        size = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return flat[:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a [n, i, k] times b [n, k, j] in the scratch tensor `name`."""
        return torch.bmm(a, b, out=self.get(name, (a.shape[0], a.shape[1], b.shape[2]), a.dtype, a.device))

    def pick(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows] along dim 0 in the scratch tensor `name`."""
        return torch.index_select(x, 0, rows, out=self.get(name, (len(rows), *x.shape[1:]), x.dtype, x.device))


class TileRows:
    """[B, Hq, rows, D] (or without D) as rows of tiles [n, tile_rows, D] that can be taken and put, never as a whole.

    A copy of the whole tensor would cost more in page faults than the small steps here.
    """

    def __init__(self, x: Tensor, plan: TilePlan) -> None:
        self.plan = plan
        self.tail = x.shape[3:]
        self.flat = None
        if plan.fold == 1 and x.is_contiguous():
            self.flat = x.view(plan.num_tiles, plan.tile_rows, *self.tail)
        x = x.unflatten(2, (plan.blocks, plan.block_rows)).unflatten(1, (plan.heads, plan.fold))
        self.parts = x.transpose(2, 3)  # [B, heads, blocks, fold, block_rows, ...]

    def take(self, chunk: Chunk, dtype: torch.dtype, work: Workspace, name: str) -> Tensor:
        """[n, tile_rows, ...] in `dtype`: a view, or the scratch tensor `name`."""
        if self.flat is None:
            taken = self.parts[self._where(chunk)].flatten(1, 2)
        elif chunk.span is not None:
            taken = self.flat[chunk.span]
        else:
            taken = work.pick(name, self.flat, chunk.tiles)
        if taken.dtype == dtype:
            return taken
        return work.get(name + " cast", taken.shape, dtype, taken.device).copy_(taken)

    def put(self, chunk: Chunk, rows: Tensor) -> None:
        """Write [n, tile_rows, ...]."""
        if self.flat is None:
            self.parts[self._where(chunk)] = rows.unflatten(1, (self.plan.fold, self.plan.block_rows)).to(
                self.parts.dtype
            )
        elif chunk.span is not None:
            self.flat[chunk.span].copy_(rows)
        else:
            self.flat.index_copy_(0, chunk.tiles, rows.to(self.flat.dtype))

    def _where(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        pair = chunk.tiles // self.plan.blocks
        return pair // self.plan.heads, pair % self.plan.heads, chunk.tiles % self.plan.blocks


class BlockTable:
    """Key blocks of a [B, H, N, D] tensor as rows that can be gathered.

    A layout that is already a table of blocks is used in place. Any other one (other strides, a partial last block)
    is copied once when most blocks will be read, and indexed token by token when few are (decoding).
    Keys past the end come out as zeros or as copies of the last key: they are always masked.
    """

    def __init__(self, x: Tensor, block: int, *, few: bool = False) -> None:
        batch, heads, length, dim = x.shape
        self.batch, self.heads, self.block, self.dim = batch, heads, block, dim
        self.blocks = -(-length // block)
        self.device, self.dtype = x.device, x.dtype
        self.source = None
        if few and not (x.is_contiguous() and length % block == 0):
            self.source = x
            return
        padding = self.blocks * block - length
        if padding:
            x = torch.cat([x, x.new_zeros(batch, heads, padding, dim)], 2)
        self.table = x.reshape(batch * heads * self.blocks, block * dim)

    def take(self, rows: Tensor, dtype: torch.dtype, work: Workspace, name: str) -> Tensor:
        """rows [n, c] of the table -> [n, c * block, D] in `dtype`, in the scratch tensor `name`."""
        taken = self._take(rows, work, name)
        if taken.dtype == dtype:
            return taken
        return work.get(name + " cast", taken.shape, dtype, taken.device).copy_(taken)

    def _take(self, rows: Tensor, work: Workspace, name: str) -> Tensor:
        n, width = rows.shape
        if self.source is not None:
            pair, block = rows // self.blocks, rows % self.blocks
            token = block[:, :, None] * self.block + torch.arange(self.block, device=rows.device)
            token = token.clamp_(max=self.source.shape[2] - 1)
            return self.source[pair[:, :, None] // self.heads, pair[:, :, None] % self.heads, token].flatten(1, 2)
        return work.pick(name, self.table, rows.reshape(-1)).view(n, width * self.block, self.dim)
