"""Rows of tensors in tiles of queries and halos of keys, a chunk of tiles at a time: what the torch paths share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..routed.workspace import Workspace
from .geometry import Window
from .tiles import Tiling, choose_sizes, tiling

# Scores that are formed at a time: what stays in a core's cache, and what fills a GPU.
CPU_SCORES, GPU_SCORES = 1 << 16, 1 << 25
# Masks of at most this many entries are kept from call to call.
KEPT_MASK = 1 << 16
# Lists of rows of at most this many entries likewise.
KEPT_ROWS = 1 << 19


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tiles of one batch row computed together, for a range of KV heads, with the rows they read.

    Args:
        query_rows: rows of a query tensor `[N, Hq, ...]` seen as `[N * Hq, ...]`, flat from `[tiles, heads, group,
            size]`.
        key_rows: rows of a key tensor seen as `[(N + M) * Hkv, ...]`, flat from `[tiles, heads, halo + M]`.
        mask_rows: entries of a mask `[N + M]`, as `[tiles, halo + M]`.
        runs: tiles, counted from the chunk's first, that share one mask, and their kinds.
    """

    tiles: slice
    heads: slice
    query_rows: Tensor
    key_rows: Tensor
    mask_rows: Tensor
    runs: tuple[tuple[slice, tuple[int, ...]], ...]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Tiles and heads."""
        return self.tiles.stop - self.tiles.start, self.heads.stop - self.heads.start

    @cached_property
    def count(self) -> int:
        """Tiles times heads."""
        return math.prod(self.shape)


@dataclass(eq=False)
class TiledGrid:
    """One call's tiling with its sizes.

    Args:
        windows: of each axis; heads: KV heads; group: query heads of each; extra: keys off the grid, which every
            query sees; device; dtype: of the computation.
    """

    windows: tuple[Window, ...]
    heads: int
    group: int
    extra: int
    device: torch.device
    dtype: torch.dtype
    tiles: Tiling = field(init=False)
    scratch: Workspace = field(init=False)

    def __post_init__(self) -> None:
        self.tiles = tiling(self.windows, choose_sizes(self.windows))
        self.scratch = Workspace(self.device, keep=True)

    @cached_property
    def queries(self) -> int:
        """Rows of a tile: its queries for each query head of the KV head."""
        return self.group * self.tiles.size

    @cached_property
    def keys(self) -> int:
        """Columns of a tile: its halo and the extra keys."""
        return self.tiles.halo + self.extra

    def chunks(self) -> Iterator[Chunk]:
        """All tiles of a batch row, so many at a time that the scores stay within bounds."""
        most = CPU_SCORES if self.device.type == "cpu" else GPU_SCORES
        fit = max(most // max(self.queries * self.keys, 1), 1)
        cut = self.tiles, self.heads, self.group, self.extra, self.device, min(fit, self.heads), fit
        rows = self.tiles.count * self.heads * (self.queries + self.keys)
        return iter(_kept_chunks(*cut)) if rows <= KEPT_ROWS else _chunks(*cut)

    def parts(self, x: Tensor, chunk: Chunk) -> Tensor:
        """A tensor `[rows, group * size, C]` as `[tiles, heads, group, size, C]`."""
        return x.view(*chunk.shape, self.group, self.tiles.size, -1)

    def scores(self, name: str, chunk: Chunk) -> Tensor:
        """Scratch memory `[rows, group * size, halo + M]` for the scores of a chunk."""
        return self.scratch.take(name, (chunk.count, self.queries, self.keys), self.dtype)

    # -- rows in and out -------------------------------------------------------------------------------------------

    def take_queries(self, name: str, x: Tensor, chunk: Chunk) -> Tensor:
        """`[rows, group * size, C]` of a batch row `[N * Hq, C]`, in the scratch memory of this name."""
        return self._take(name, x, chunk.query_rows, chunk.count)

    def take_keys(self, name: str, x: Tensor, chunk: Chunk) -> Tensor:
        """`[rows, halo + M, C]` of a batch row `[(N + M) * Hkv, C]`."""
        return self._take(name, x, chunk.key_rows, chunk.count)

    def _take(self, name: str, x: Tensor, rows: Tensor, count: int) -> Tensor:
        got = self.scratch.take(name, (rows.numel(), x.shape[-1]), x.dtype)
        torch.index_select(x, 0, rows, out=got)
        if x.dtype != self.dtype:
            got = self.scratch.take(name, got.shape, self.dtype).copy_(got)
        return got.view(count, -1, x.shape[-1])

    def room(self, name: str, rows: int, size: int, chunk: Chunk) -> Tensor:
        """Scratch memory `[rows of the chunk, rows, size]`."""
        return self.scratch.take(name, (chunk.count, rows, size), self.dtype)

    def put_queries(self, x: Tensor, chunk: Chunk, rows: Tensor) -> None:
        """Write `[rows, group * size, C]` to their places in `[N * Hq, C]`.

        The padding of a tile repeats a query, so it writes the same again.
        """
        x.index_copy_(0, chunk.query_rows, rows.view(-1, x.shape[-1]).to(x.dtype))

    def add_queries(self, x: Tensor, chunk: Chunk, rows: Tensor) -> None:
        """Add them; padding must hold zeros."""
        x.index_add_(0, chunk.query_rows, rows.view(-1, x.shape[-1]))

    def add_keys(self, x: Tensor, chunk: Chunk, rows: Tensor) -> None:
        """Add `[rows, halo + M, C]` to `[(N + M) * Hkv, C]`."""
        x.index_add_(0, chunk.key_rows, rows.view(-1, x.shape[-1]))

    def clear_padding(self, x: Tensor, chunk: Chunk) -> Tensor:
        """`[rows, group * size, C]` with zeros in the padding of tiles, in place."""
        if self.tiles.padded:
            padding = ~self.tiles.real(chunk.tiles).to(self.device)
            self.parts(x, chunk).masked_fill_(padding[:, None, None, :, None], 0)
        return x

    # -- masks -----------------------------------------------------------------------------------------------------

    def hidden(self, kinds: tuple[int, ...]) -> Tensor:
        """Keys that the queries of a tile do not see, bool `[size, halo + M]`."""
        mask = ~self.tiles.mask(kinds).to(self.device)
        return torch.nn.functional.pad(mask, (0, self.extra)) if self.extra else mask

    def chunk_hidden(self, chunk: Chunk) -> Tensor:
        """The same for every row, bool `[rows, group * size, halo + M]`."""
        shape = (chunk.count, self.queries, self.keys)
        hidden = torch.empty(shape, dtype=torch.bool, device=self.device)
        parts = self.parts(hidden, chunk)
        for run, kinds in chunk.runs:
            parts[run] = self.hidden(kinds)
        return hidden

    def mask_table(self, kinds: tuple[int, ...], *, factors: bool) -> Tensor | None:
        """-inf where hidden and else 0, as factors 0 and 1, `[halo + M, group * size]`; None where nothing is
        hidden."""
        made = _kept_mask_table if self.queries * self.keys <= KEPT_MASK else _mask_table
        return made(self.tiles, kinds, self.group, self.extra, factors, self.device, self.dtype)


def flat_rows(x: Tensor) -> tuple[Tensor, ...]:
    """`[N * H, C]` of every batch row of a contiguous `[B, N, H, C]`."""
    return x.flatten(1, 2).unbind(0)


def finite(*tensors: Tensor) -> bool:
    """Whether no value is inf or NaN; a sum beyond the dtype's range counts as inf."""
    return all(math.isfinite(float(x.sum())) for x in tensors)


def mix(weights: Tensor, values: Tensor, hidden: Tensor | None, into: Tensor) -> Tensor:
    """Batched weights @ values, written to `into`. With `hidden` (bool, as weights), values that are not finite give
    NaN where a row does not hide them and nothing elsewhere."""
    if hidden is None:
        return torch.bmm(weights, values, out=into)
    sees = (~hidden).to(weights.dtype) @ (~values.isfinite()).to(weights.dtype)
    product = torch.bmm(weights, values.nan_to_num(0, 0, 0), out=into)
    return product.masked_fill_(sees > 0, float("nan"))


def mix_transposed(weights: Tensor, rows: Tensor, hidden: Tensor | None, into: Tensor) -> Tensor:
    """weights^T @ rows in the same way."""
    return mix(weights.mT, rows, None if hidden is None else hidden.mT, into)


def _ranges(length: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _chunks(
    tiles: Tiling, heads: int, group: int, extra: int, device: torch.device, heads_fit: int, fit: int
) -> Iterator[Chunk]:
    total = math.prod(axis.window.length for axis in tiles.axes)
    members = torch.arange(group, device=device)[:, None]
    more = torch.arange(total, total + extra, device=device)
    for t in _ranges(tiles.count, max(fit // heads_fit, 1)):
        query_tokens, key_tokens = tiles.query_tokens(t).to(device), tiles.key_tokens(t).to(device)
        if extra:
            key_tokens = torch.cat([key_tokens, more.expand(len(key_tokens), -1)], 1)
        runs = tuple(_runs_within(tiles, t))
        for h in _ranges(heads, heads_fit):
            numbers = torch.arange(h.start, h.stop, device=device)[:, None]
            query_rows = query_tokens[:, None, None] * (heads * group) + (numbers[..., None] * group + members)
            key_rows = key_tokens[:, None] * heads + numbers
            yield Chunk(t, h, query_rows.flatten(), key_rows.flatten(), key_tokens, runs)


def _runs_within(tiles: Tiling, part: slice) -> Iterator[tuple[slice, tuple[int, ...]]]:
    for begin, end, kinds in tiles.runs:
        if begin < part.stop and end > part.start:
            yield slice(max(begin, part.start) - part.start, min(end, part.stop) - part.start), kinds


@lru_cache(16)
def _kept_chunks(*cut) -> tuple[Chunk, ...]:
    with torch.inference_mode(False):
        return tuple(_chunks(*cut))


def _mask_table(
    tiles: Tiling,
    kinds: tuple[int, ...],
    group: int,
    extra: int,
    factors: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    with torch.inference_mode(False):
        mask = tiles.mask(kinds)
        if bool(mask.all()):
            return None
        mask = torch.nn.functional.pad(mask, (0, extra), value=True).mT.repeat(1, group)
        table = mask.to(dtype) if factors else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return table.to(device)


_kept_mask_table = lru_cache(128)(_mask_table)
