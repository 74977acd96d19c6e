"""What the torch path of pyramid attention works on: tiles of queries, and the pools of one KV head that they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_sparse.tiling import Workspace
from .pooling import LEVELS, UNITS, last_positions, num_blocks, pool_counts, write_pools

# Columns added to values (their weight), and in half precision to keys (a bias in two parts); the rest is alignment.
EXTRA = 8


class Tile(NamedTuple):
    """One query block of one head: its number among those of all heads, its query rows, its units, edges among them."""

    number: int
    rows: range
    units: Tensor
    edge: int

    def hidden(self, last: Tensor, offset: int) -> Tensor | None:
        """Bool [rows, edge * u]: pools among the trailing `edge` units that a row must not see; None without edges."""
        if not self.edge:
            return None
        ends = last[self.units[len(self.units) - self.edge :]].flatten()
        position = torch.arange(self.rows.start, self.rows.stop, device=last.device) + offset
        return ends > position[:, None]


@dataclass(frozen=True)
class Plan:
    """The tiles of a call and the pools each of them reads.

    units: for every tile int64 rows in the table of its (batch, KV head), ascending; edges: how many trailing units of
    a tile hold pools that some row must not see. Tiles are numbered by head among all [B * Hq], then by query block.
    """

    q_len: int
    ratio: int
    block_q: int
    units: tuple[Tensor, ...]
    edges: list[int]

    @property
    def complete(self) -> bool:
        """Whether every tile reads something."""
        return all(len(units) for units in self.units)

    @property
    def size(self) -> int:
        """Units that are read, all tiles together."""
        return sum(len(units) for units in self.units)

    def tiles(self, row: int) -> Iterator[Tile]:
        """The tiles of the query heads that share table `row`, those that read nothing left out."""
        rows = [range(i, min(i + self.block_q, self.q_len)) for i in range(0, self.q_len, self.block_q)]
        first = row * self.ratio * len(rows)
        for number in range(first, first + self.ratio * len(rows)):
            if len(self.units[number]):
                yield Tile(number, rows[number % len(rows)], self.units[number], self.edges[number])

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, Hq, Nq, ...] as views of its tiles, by their numbers."""
        return [tile for head in per_head(x) for tile in head.split(self.block_q)]


def plan_tiles(levels: Tensor, query: Tensor, key: Tensor, block_q: int, block_k: int, causal: bool) -> Plan:
    """Turn levels into lists of units; a causal plan leaves out units that no row of the tile may see."""
    batch, heads, q_len = query.shape[:3]
    k_len, device = key.shape[2], levels.device
    num_q, num_k = num_blocks(q_len, block_q), num_blocks(k_len, block_k)
    levels = levels[:, :, :num_q, :num_k].expand(batch, heads, num_q, num_k)
    level_of_unit = torch.tensor([level for level in LEVELS for _ in range(8 // level)], device=device)
    chosen = levels[..., None] == level_of_unit  # [B, H, nq, nk, 15]
    edges = torch.zeros(batch * heads * num_q, dtype=torch.int64)
    if causal:
        last = last_positions(k_len, block_k, "exact", device).view(num_k, UNITS, -1)
        first_row = torch.arange(num_q, device=device)[:, None, None] * block_q + (k_len - q_len)
        last_row = (first_row + block_q).clamp(max=k_len) - 1
        chosen = chosen & (last[..., 0] <= last_row)
        # Units are listed block by block: everything from the first block with a hidden pool on counts as edge.
        from_edge = (last_positions(k_len, block_k, "replicate", device)[:, -1] > first_row[..., 0]).cumsum(-1) > 0
        edges = (chosen & from_edge[..., None]).flatten(3).sum(-1).flatten()
    chosen = chosen.flatten(3).flatten(0, 2)
    units = chosen.nonzero()[:, 1].split(chosen.sum(1).tolist())
    return Plan(q_len, heads // key.shape[1], block_q, units, edges.tolist())


class Tables:
    """Keys, sums of values, and weights of one (batch, KV head) at a time, as rows of units that can be gathered.

    Weights stay apart: as one more column of the values they would cost the product as much as eight.
    One head at a time: the memory is a fraction, and fresh memory costs more than the pooling that fills it.
    """

    def __init__(self, key: Tensor, value: Tensor, block_k: int, tail: str, dtype: torch.dtype) -> None:
        self.block, self.unit, self.tail = block_k, block_k // 8, tail
        self.rows, self.dim, self.value_dim = key.shape[0] * key.shape[1], key.shape[3], value.shape[3]
        self._sources = per_head(key), per_head(value)
        weights, self.members = pool_counts(key.shape[2], block_k, tail, key.device)
        self._padding = weights[-1, :block_k, None] == 0
        self.last = last_positions(key.shape[2], block_k, tail, key.device).view(-1, block_k // 8)
        self._keys, self._values = (
            torch.empty(*weights.shape, x.shape[3], dtype=dtype, device=key.device) for x in (key, value)
        )
        self.keys, self.values = (x.view(-1, self.unit * x.shape[-1]) for x in (self._keys, self._values))
        self.weights = weights.to(dtype).view(-1, self.unit)

    def load(self, row: int) -> None:
        """Pool (batch, KV head) number `row`; the tables hold it until the next call."""
        write_pools(self._keys, self._sources[0][row], self.block, self.tail, self.members)
        write_pools(self._values, self._sources[1][row], self.block, self.tail, None)
        self._values[-1, : self.block].masked_fill_(self._padding, 0)

    def gather(self, units: Tensor, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [M, D], sums of values [M, Dv] and weights [M] of some units."""
        keys, values = work.pick("keys", self.keys, units), work.pick("values", self.values, units)
        return keys.view(-1, self.dim), values.view(-1, self.value_dim), self.weights[units].view(-1)


class Piece(NamedTuple):
    """Scratch tensors for the units of a piece: keys and values as they are gathered and as they are multiplied."""

    key_units: Tensor
    value_units: Tensor
    keys: Tensor  # [D, M]
    values: Tensor  # [M, Dv]
    scores: Tensor  # [rows, M]


class Pieces:
    """Scratch tensors of one call for up to `limit` units; views are made once, they cost as much as small products."""

    def __init__(self, tables: Tables, limit: int, block_q: int) -> None:
        self.limit, self._unit = limit, tables.unit
        self._keys, self._values = (x.new_empty(limit, x.shape[1]) for x in (tables.keys, tables.values))
        self._scores = tables.keys.new_empty(block_q * limit * tables.unit)
        self._made: dict[tuple[int, int], Piece] = {}

    def get(self, rows: int, units: int) -> Piece:
        """Uninitialised; shares its memory with the last one."""
        found = self._made.get((rows, units))
        if found is None:
            keys, values = self._keys[:units], self._values[:units]
            size = units * self._unit
            shaped = keys.view(size, -1).T, values.view(size, -1), self._scores[: rows * size].view(rows, size)
            found = self._made[rows, units] = Piece(keys, values, *shaped)
        return found


def per_head(x: Tensor) -> list[Tensor]:
    """[B, H, N, ...] as B * H views: picking rows of a view costs half of indexing the whole."""
    return [head for row in x.unbind(0) for head in row.unbind(0)]
