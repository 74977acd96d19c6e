"""Where queries and key blocks sit: the tables that kernels of routed attention read when there is a token index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device_sequences import DeviceSequences, Tiles, device_sequences

# Sequences of a batch row that find a program of their own in the grid; more share programs.
SPARE_PROGRAMS = 64


class Grid(NamedTuple):
    """Work along one axis: `limit` entries per batch row in the table, taken by `programs` programs in turns.

    count: int32 [B], entries of each batch row, or None when all `limit` of them are used.
    table: int32 [B, limit, 6], or None when it follows from the lengths.
    """

    limit: int
    programs: int
    count: Tensor | None
    table: Tensor | None


class Layout:
    """Sizes of a call and, with a token index, the device tables of its sequences.

    rows: int32 [B, Nq, 3] or None: position of every query row in its sequence (negative: it sees nothing), number of
        the sequence's first block in the batch row, and how many blocks it has.
    q_rows, k_rows: int32 [B, Nq], [B, Nk] or None: row behind each slot.
    blocks: the key blocks; table: first key slot, length, position of the first key, first query slot, number of
        queries, number of keys of the sequence.
    """

    def __init__(self, index: Tensor | None, q_len: int, k_len: int, block_size: int, causal: bool) -> None:
        self.q_len, self.k_len, self.block_size, self.causal = q_len, k_len, block_size, causal
        self.has_index = index is not None
        self.rows = self.q_rows = self.k_rows = self._sequences = self._bases = None
        count = -(-k_len // block_size)
        if index is None:
            self.blocks = Grid(count, count, None, None)
            return
        self._sequences = found = device_sequences(index, q_len, k_len, causal)
        self.q_rows, self.k_rows = found.q_rows, found.k_rows
        limit = min(k_len, count + q_len)
        tiles = Tiles(*(t if t.dim() == 1 else t[:, :limit] for t in found.key_tiles(block_size)))
        columns = (
            tiles.first,
            tiles.length,
            tiles.block_id * block_size,
            tiles.q_first,
            tiles.q_length,
            tiles.k_length,
        )
        programs = min(limit, count + SPARE_PROGRAMS)
        self.blocks = Grid(limit, programs, tiles.count, torch.stack(columns, -1))
        self._bases = _first_blocks(tiles, found)
        self.rows = _row_table(found, self._bases, block_size)

    def query_tiles(self, size: int) -> Grid:
        """Tiles of `size` queries; table: first slot, length, position of the first, first key slot, keys, base."""
        count = -(-self.q_len // size)
        if not self.has_index:
            return Grid(count, count, None, None)
        tiles = self._sequences.query_tiles(size)
        bases = self._bases.gather(1, tiles.number.long())
        position = tiles.first - tiles.q_first + tiles.k_length - tiles.q_length
        columns = (tiles.first, tiles.length, position, tiles.k_first, tiles.k_length, bases)
        programs = min(self.q_len, count + SPARE_PROGRAMS)
        return Grid(self.q_len, programs, tiles.count, torch.stack(columns, -1))


def _first_blocks(tiles: Tiles, found: DeviceSequences) -> Tensor:
    """int32 [B, Nq]: by ordinal of the sequence, the number of its first block; 0 for one without keys."""
    batch, limit = tiles.first.shape
    number = torch.arange(limit, dtype=torch.int32, device=tiles.first.device).expand(batch, limit)
    first = (tiles.block_id == 0) & (tiles.length > 0)
    spare = found.number.shape[1]
    bases = number.new_zeros(batch, spare + 1)
    return bases.scatter_(1, torch.where(first, tiles.number, spare).long(), number)[:, :spare]


def _row_table(found: DeviceSequences, bases: Tensor, block_size: int) -> Tensor:
    slot = torch.arange(found.number.shape[1], dtype=torch.int32, device=bases.device)
    position = slot - found.q_first + found.k_length - found.q_length
    position = torch.where(found.q_length > 0, position, -1)
    blocks = (found.k_length + block_size - 1) // block_size
    columns = torch.stack([position, bases.gather(1, found.number.long()), blocks], -1)
    rows = found.q_rows.long()[..., None].expand_as(columns)
    return torch.empty_like(columns).scatter_(1, rows, columns)
