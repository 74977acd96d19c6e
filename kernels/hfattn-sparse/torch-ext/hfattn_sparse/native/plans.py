"""What ops whose rows are picked one by one share: rows cut into tiles, lists that are ranges, rows done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..masked import masked_attention
from .tiles import Lists

# Rows that the kernel takes from a tile at a time: more would read the same list again.
TILE_ROWS = 128
# Scores that rows done again hold at one time.
_MOST_SCORES = 1 << 22


class Tiles(NamedTuple):
    """Rows of one owner after the other, cut into tiles. starts: int64 `[T + 1]`; owners: int64 `[T]`."""

    starts: Tensor
    owners: Tensor

    @classmethod
    def cut(cls, counts: Tensor) -> Tiles:
        """counts int64 `[owners]`: rows of each; a tile holds rows of one owner only."""
        tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
        owners = torch.arange(len(counts)).repeat_interleave(tiles)
        within = torch.arange(len(owners)) - (tiles.cumsum(0) - tiles)[owners]
        starts = (counts.cumsum(0) - counts)[owners] + within * TILE_ROWS
        return cls(torch.cat([starts, counts.sum()[None]]), owners)

    @property
    def last(self) -> Tensor:
        """The last row of each tile."""
        return self.starts[1:] - 1


def ranges(first: Tensor, counts: Tensor) -> Lists:
    """The list of tile t is `first[t, r], first[t, r] + 1, ...`, `counts[t, r]` of them, for all r in turn.

    first, counts: int64 `[T, R]`.
    """
    ends = counts.flatten().cumsum(0)
    inside = torch.arange(int(ends[-1]) if len(ends) else 0)
    segments = inside + (first.flatten() - ends + counts.flatten()).repeat_interleave(counts.flatten())
    starts = torch.cat([ends.new_zeros(1), ends.view(counts.shape)[:, -1]])
    return Lists(starts, segments)


def careful(
    query: Tensor, key: Tensor, value: Tensor, visible: Callable[[slice], Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """out `[n, Dv]`, lse `[n]` of rows that may have met NaN or infinities: those of hidden keys stay out.

    query, key, value: `[n, D]`, `[N, D]`, `[N, Dv]`; visible: gives the keys that some of the rows see, bool
    `[some, N]`. A row that sees a value which is not finite gives NaN there.
    """
    broken = ~value.isfinite()
    value, broken = value.masked_fill(broken, 0)[None, None], broken.float()
    out, lse = query.new_empty(len(query), value.shape[3]), torch.empty(len(query))
    step = max(_MOST_SCORES // max(len(key), 1), 1)
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        seen = visible(rows)
        part, sums = masked_attention(query[None, None, rows], key[None, None], value, seen, scale=scale)
        out[rows], lse[rows] = part[0, 0].masked_fill_(seen.float() @ broken > 0, float("nan")), sums[0, 0]
    return out, lse
