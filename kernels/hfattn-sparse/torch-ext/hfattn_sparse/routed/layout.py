"""Bookkeeping of routed attention: positions, visible pairs, and rows sorted by the key block they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """Sizes of one call. Row r sits at position r + offset; block j holds keys j * block_size up to its end.

    The first `skip` rows are left to somebody else.
    """

    q_len: int
    k_len: int
    block_size: int
    causal: bool
    skip: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-self.k_len // self.block_size)

    @property
    def offset(self) -> int:
        return self.k_len - self.q_len

    @property
    def first_row(self) -> int:
        """First row to compute: one that may see a key."""
        return min(self.q_len, max(self.skip, -self.offset)) if self.causal else self.skip

    @property
    def visible_pairs(self) -> int:
        """(row, key) pairs of one head without any choice of blocks."""
        if not self.causal:
            return self.q_len * self.k_len
        low, high = self.offset + self.first_row + 1, self.k_len
        return (low + high) * (high - low + 1) // 2 if self.q_len > self.first_row else 0

    def block_width(self, block: int) -> int:
        return min(self.block_size, self.k_len - block * self.block_size)

    def own_block(self, device: torch.device) -> torch.Tensor:
        """int32 [q_len]: block of a row's own position, -1 before `first_row`; num_blocks if not causal."""
        if not self.causal:
            own = torch.full((self.q_len,), self.num_blocks, dtype=torch.int32, device=device)
        else:
            own = torch.arange(self.offset, self.offset + self.q_len, dtype=torch.int32, device=device)
            own.div_(self.block_size, rounding_mode="floor")
        own[: self.first_row] = -1
        return own


def clean_routes(routes: torch.Tensor) -> torch.Tensor:
    """int32 routes in which no row names a block twice (repeats become -1); unchanged where that already holds."""
    routes = routes.to(torch.int32)
    before, after = routes[..., :-1], routes[..., 1:]
    if bool(((after < 0) | ((after > before) & (before >= 0))).all()):  # ascending, then -1: what the router writes
        return routes
    routes = routes.sort(dim=-1).values
    repeated = torch.zeros_like(routes, dtype=torch.bool)
    repeated[..., 1:] = routes[..., 1:] == routes[..., :-1]
    return routes.masked_fill_(repeated, -1)


def density(routes: torch.Tensor, shape: Geometry) -> float:
    """Share of the visible (row, key) pairs that clean routes [B, H, Nq, K] keep: 0 .. 1."""
    visible = shape.visible_pairs * routes.shape[0] * routes.shape[1]
    if not visible:
        return 0.0
    own = shape.own_block(routes.device)[:, None]
    kept = int(((routes >= 0) & (routes < own)).sum()) * shape.block_size
    if shape.causal:
        position = torch.arange(shape.offset, shape.k_len, device=routes.device)
        rows = ((routes == own) & (own >= 0)).any(-1).flatten(0, 1).sum(0)  # heads that read the own block of a row
        kept += int((rows * (position % shape.block_size + 1)).sum())
    else:
        missing = shape.num_blocks * shape.block_size - shape.k_len
        kept -= int((routes == shape.num_blocks - 1).sum()) * missing if missing else 0
    return kept / visible


def complete_rows(routes: torch.Tensor, shape: Geometry) -> int:
    """Leading rows that read every block they may see, in all heads, in whole blocks (causal, one row per key)."""
    most = min(routes.shape[3] * shape.block_size, shape.q_len)  # later rows have more blocks than routes
    own = shape.own_block(routes.device)[:most, None]
    first = routes[:, :, :most]
    complete = ((first >= 0) & (first <= own)).sum(-1, dtype=torch.int32) == own[:, 0] + 1
    missing = (~complete).any(0).any(0).nonzero()
    if not missing.numel():
        return most
    return int(missing[0]) // shape.block_size * shape.block_size


def rows_by_block(routes: torch.Tensor, own: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, list[int]]:
    """Rows that read every block before their own.

    Args:
        routes: int32 [M, K], clean.
        own: int32 [M].

    Returns:
        int64 rows sorted by (block, row), and the n + 1 bounds of the segments.
    """
    # Integers of few bits are sorted digit by digit: the narrower, the faster.
    narrow = torch.int16 if num_blocks < torch.iinfo(torch.int16).max else torch.int32
    keys = routes.masked_fill((routes < 0) | (routes >= own[:, None]), num_blocks).to(narrow).view(-1)
    keys, order = keys.sort(dim=-1, stable=True)
    bounds = torch.searchsorted(keys, torch.arange(num_blocks + 1, dtype=narrow, device=keys.device))
    listed = order[: int(bounds[-1])].div(max(1, routes.shape[1]), rounding_mode="floor")
    return listed, bounds.tolist()


@dataclass(frozen=True)
class OwnPiece:
    """`count` tiles of `height` rows from `row` on; tile i reads the first `width` keys of block `block` + i."""

    row: int
    block: int
    count: int
    height: int
    width: int


def own_pieces(shape: Geometry, scores: int) -> Iterator[OwnPiece]:
    """Tiles of the causal own-block step, about `scores` scores at a time.

    Whole blocks of rows and keys come several at a time; the ends, and blocks too large for that, in runs of rows of
    one block, which then read the keys up to their last row.
    """
    size, row = shape.block_size, shape.first_row
    run = max(16, min(256, scores // size))
    while row < shape.q_len:
        block, inside = divmod(row + shape.offset, size)
        whole = min(scores // size**2, (shape.q_len - row) // size)
        if inside == 0 and whole:
            yield OwnPiece(row, block, whole, size, size)
            row += whole * size
        else:
            height = min(run, size - inside, shape.q_len - row)
            yield OwnPiece(row, block, 1, height, inside + height)
            row += height


@dataclass(frozen=True)
class Batch:
    """Pieces of segments that are computed together: piece i reads block `blocks[i]`, rows `starts[i]` onwards."""

    blocks: list[int]
    starts: list[int]
    counts: list[int]

    @property
    def height(self) -> int:
        return self.counts[0]

    def rows(self, listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """int64 [len(blocks) * height]: rows of every piece, padded by repeating its last row.

        Also which of them are real (bool), or None where all are.
        """
        if len(self.blocks) == 1:
            return listed[self.starts[0] : self.starts[0] + self.height], None
        start, count = torch.tensor([self.starts, self.counts], device=listed.device)[..., None]
        step = torch.arange(self.height, device=listed.device)
        index = start + torch.minimum(step, count - 1)
        real = None if self.counts[-1] == self.height else (step < count).view(-1)
        return listed.index_select(0, index.view(-1)), real


def batch_segments(bounds: list[int], rows_per_batch: int, *, alone: int = -1) -> list[Batch]:
    """Cut segments into pieces of at most `rows_per_batch` rows and put pieces of similar height together.

    Long segments are computed alone, from views of their block. Only short ones share a batch, so that there are few
    and large steps; sorting by height keeps the padding small. Block `alone` (a shorter last one) is never shared.
    """
    pieces, batches = [], []
    for block, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        parts = -(-(end - start) // rows_per_batch)
        for part in range(parts):
            low = start + (end - start) * part // parts
            high = start + (end - start) * (part + 1) // parts
            if block == alone:
                batches.append(Batch([block], [low], [high - low]))
            else:
                pieces.append((high - low, block, low))
    pieces.sort(key=lambda piece: (-piece[0], piece[1], piece[2]))
    first = 0
    while first < len(pieces):
        height = pieces[first][0]
        shortest = height - max(height // 8, 16)
        last = min(len(pieces), first + max(1, rows_per_batch // height if 4 * height <= rows_per_batch else 1))
        end = first + 1
        while end < last and pieces[end][0] >= shortest:
            end += 1
        counts, blocks, starts = zip(*pieces[first:end], strict=True)
        batches.append(Batch(list(blocks), list(starts), list(counts)))
        first = end
    return batches
