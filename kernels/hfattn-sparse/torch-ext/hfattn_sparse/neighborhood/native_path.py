"""Neighborhood attention by the compiled CPU kernel: the tiles of the grid with tables of what their queries see."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import native
from .geometry import Window
from .tiles import Tiling, candidates, tiling

LOG2E = math.log2(math.e)
# Estimated nanoseconds of a score (those of its head dimension beside), of reading a number of a key or value, and of a
# tile; their ratios decide the tile.
SCORE, SCORE_OF_DIM, READ, TILE = 0.35, {torch.float32: 0.027, torch.bfloat16: 0.006}, 0.08, 400.0
# Bytes of all tables, and entries of the lists of keys of all tiles: what is larger torch computes a chunk at a time.
MOST_TABLES, MOST_LISTED = 1 << 26, 1 << 22
# Calls of fewer scores stay in torch.
SMALL = 1 << 17
# Layouts and tables that are kept; each is bounded by the two above.
_CACHED = 4


def takes(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, key_mask: Tensor | None, windows, scale: float
) -> bool:
    """Whether the compiled kernel takes the call: where it is built, unless that is small."""
    if not query.numel() or native.obstacle(query, key, value, scale) is not None:
        return False
    tiles = _tiles(windows, query)
    tables = len(tiles.runs) * (1 if rpb is None else query.shape[2]) * _strips(tiles) * native.strip_rows() * 4
    for obstacle, reason in (
        (key_mask is not None, "it takes no key_mask"),
        (tables * _keys(tiles, query, key) > MOST_TABLES, "its tables of masks and biases would be too large"),
        (tiles.count * _keys(tiles, query, key) > MOST_LISTED, "the lists of its tiles' keys would be too large"),
    ):
        if obstacle:
            native.refuse(reason)
            return False
    if native.wanted():
        return True
    return native.pays(query, value) and query[..., 0].numel() * _keys(tiles, query, key) > SMALL


def forward(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: tuple[Window, ...], scale: float
) -> tuple[Tensor, Tensor] | None:
    """out `[B, N, Hq, Dv]`, lse `[B, N, Hq]` fp32; None where a result is not finite. Arguments as `takes`."""
    batch, tokens, heads, _ = query.shape
    out, lse = query.new_empty(batch, tokens, heads, value.shape[3]), torch.empty(batch, tokens, heads)
    tiles, extra, strip = _tiles(windows, query), key.shape[1] - tokens, native.strip_rows()
    memory = query.stride()[:3], key.stride()[:3], value.stride()[:3]
    offsets, numbers, places = _layout(tiles, batch, tokens, heads, key.shape[2], extra, memory)
    if rpb is None:
        tables, table_of = _mask_tables(tiles, extra, strip), _table_of(tiles, batch, heads, False)
    else:
        tables = _strips_of(_bias_tables(tiles, rpb.detach().float(), extra), strip)
        table_of = _table_of(tiles, batch, heads, True)
    call = native.Windows(*offsets, numbers, *places, tables, table_of, heads)
    finite = native.attend_windows(query, key, value, call, scale, out, lse)
    return (out, lse) if finite else None


def _tiles(windows: tuple[Window, ...], query: Tensor) -> Tiling:
    return tiling(windows, _sizes(windows, query.shape[3], query.dtype, native.strip_rows()))


@lru_cache(_CACHED)
def _sizes(windows: tuple[Window, ...], dim: int, dtype: torch.dtype, strip: int) -> tuple[int, ...]:
    """Queries per tile along each axis that cost least; a strip costs the same however few queries are in it."""

    def cost(shapes: tuple[tuple[int, int, int], ...]) -> float:
        size, halo, count = (math.prod(part) for part in zip(*shapes, strict=True))
        rows = -(-size // strip) * strip
        of_key = rows * (SCORE + SCORE_OF_DIM[dtype] * dim) + 2 * dim * READ
        return count * (halo * of_key + TILE)

    options = [candidates(window) for window in windows]
    return tuple(shape[0] for shape in min(itertools.product(*options), key=cost))


def _strips(tiles: Tiling) -> int:
    return -(-tiles.size // native.strip_rows())


def _keys(tiles: Tiling, query: Tensor, key: Tensor) -> int:
    return tiles.halo + key.shape[1] - query.shape[1]


@lru_cache(_CACHED)
def _table_of(tiles: Tiling, batch: int, heads: int, by_head: bool) -> Tensor:
    """Number of each tile's table, int64 `[B * Hq, tiles]`."""
    with torch.inference_mode(False):
        kinds = torch.cat([torch.full((end - begin,), number) for number, (begin, end, _) in enumerate(tiles.runs)])
        own = torch.arange(heads)[:, None] * (len(tiles.runs) if by_head else 0)
        return (own + kinds).repeat(batch, 1)


@lru_cache(_CACHED)
def _layout(
    tiles: Tiling, batch: int, tokens: int, heads: int, kv_heads: int, extra: int, memory: tuple[tuple[int, ...], ...]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The offsets, numbers and places of `native.Windows` for tensors with these strides of batch, tokens and heads."""
    with torch.inference_mode(False):
        everything = slice(0, tiles.count)
        queries, real = tiles.query_tokens(everything), tiles.real(everything)
        more = torch.arange(tokens, tokens + extra).expand(tiles.count, -1)
        keys = torch.cat([tiles.key_tokens(everything), more], 1)
        entry, head = torch.arange(batch)[:, None], torch.arange(heads)
        own = head // (heads // kv_heads)
        offsets = [
            (entry * strides[0] + which * strides[2]).flatten()
            for strides, which in zip(memory, (head, own, own), strict=True)
        ]
        numbers = (entry * tokens * heads + head).flatten()
        places = [places * strides[1] for strides, places in zip(memory, (queries, keys, keys), strict=True)]
        return offsets, numbers, [*places, torch.where(real, queries, -1)]


@lru_cache(_CACHED)
def _mask_tables(tiles: Tiling, extra: int, strip: int) -> Tensor:
    """0 or -inf by kind, `[kinds, strips, halo + M, strip]`."""
    with torch.inference_mode(False):
        seen = torch.stack([tiles.mask(kinds) for _, _, kinds in tiles.runs])
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        return _strips_of(torch.nn.functional.pad(hidden, (0, extra)), strip)


def _bias_tables(tiles: Tiling, rpb: Tensor, extra: int) -> Tensor:
    """The same with the relative bias `[Hq, *(2 K - 1)]`, by head, then kind: `[Hq * kinds, size, halo + M]`."""
    flat, tables = rpb.flatten(1), []
    for _, _, kinds in tiles.runs:
        bias = flat[:, tiles.bias_places(kinds)].mul_(LOG2E).masked_fill_(~tiles.mask(kinds), float("-inf"))
        tables.append(torch.nn.functional.pad(bias, (0, extra)))
    return torch.stack(tables, 1).flatten(0, 1)


def _strips_of(tables: Tensor, strip: int) -> Tensor:
    """`[tables, size, keys]` as `[tables, strips, keys, strip]`, padded."""
    tables = torch.nn.functional.pad(tables, (0, 0, 0, -tables.shape[1] % strip))
    return tables.unflatten(1, (-1, strip)).transpose(2, 3).contiguous()
