"""From a token index to sequences without leaving the device: what `sequences` does on the host, for GPU kernels.

Nothing here waits for the device and no shape depends on the data, so CUDA graphs and meta tensors work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Runs of up to `block` consecutive tokens of one sequence. All int32 `[B, T]`; entries from `count` on are void.

    count: int32 `[B]`, tiles of each batch row. A kernel walks `range(program, count[b], programs)`.
    first: slot (see `DeviceSequences`) of the tile's first token.
    length: tokens in the tile, 1 to `block`.
    block_id: ordinal of the tile inside its sequence, so token `block_id * block` of the sequence is its first.
    number: ordinal of the sequence inside its batch row, in order of its first query; sequences without keys do not
        count (theirs is void).
    q_first, q_length, k_first, k_length: the slots of the sequence's queries and keys. With bottom-right alignment
        query slot s of the sequence has position `s - q_first + k_length - q_length`, key slot s `s - k_first`.
    """

    count: Tensor
    first: Tensor
    length: Tensor
    block_id: Tensor
    number: Tensor
    q_first: Tensor
    q_length: Tensor
    k_first: Tensor
    k_length: Tensor


class DeviceSequences(NamedTuple):
    """Tokens of every batch row in slots: sequence after sequence, what belongs to none (padding) at the end.

    q_rows, k_rows: int32 `[B, Nq]`, `[B, Nk]`: the row of the tensor behind each slot.
    number, q_first, q_length, k_first, k_length: int32 `[B, Nq]`: the sequence of each query slot, as in `Tiles`;
        `q_length` 0 marks slots that belong to none.
    key_*: the same for each key slot, int32 `[B, Nk]`.
    """

    q_rows: Tensor
    k_rows: Tensor
    number: Tensor
    q_first: Tensor
    q_length: Tensor
    k_first: Tensor
    k_length: Tensor
    key_number: Tensor
    key_q_first: Tensor
    key_q_length: Tensor
    key_k_first: Tensor
    key_k_length: Tensor

    def query_tiles(self, block: int) -> Tiles:
        """Tiles of `block` queries."""
        sequence = (self.number, self.q_first, self.q_length, self.k_first, self.k_length)
        return _tiles(self.q_first, self.q_length, block, sequence)

    def key_tiles(self, block: int) -> Tiles:
        """Tiles of `block` keys."""
        sequence = (self.key_number, self.key_q_first, self.key_q_length, self.key_k_first, self.key_k_length)
        return _tiles(self.key_k_first, self.key_k_length, block, sequence)


def device_sequences(index: Tensor, q_len: int, k_len: int, causal: bool) -> DeviceSequences:
    """Sort the tokens of an index int32 `[B, 2, q_len + k_len]` (row 0 sequence id or -1, row 1 position) by sequence.

    As in `sequences.split_sequences`: sequences come in the order of their first query; keys of sequences without
    queries, and under `causal` keys beyond the newest query (slots of a static cache), belong to none. That the queries
    of a sequence are its last tokens is taken for granted; `check_alignment` tests it.
    """
    segments, positions = index[:, 0].long(), index[:, 1].long()
    # [B, Nq]: row of the first query with the same sequence id; q_len for queries that are not real.
    order = segments[:, :q_len].sort(dim=1, stable=True)
    starts = torch.searchsorted(order.values, segments[:, :q_len].contiguous())
    key_q = torch.where(segments[:, :q_len] >= 0, order.indices.gather(1, starts), q_len)
    found = torch.searchsorted(order.values, segments[:, q_len:].contiguous()).clamp(max=max(q_len - 1, 0))
    known = (order.values.gather(1, found) == segments[:, q_len:]) & (segments[:, q_len:] >= 0)
    key_k = torch.where(known, order.indices.gather(1, found), q_len)

    queries = key_q.sort(dim=1, stable=True)
    if causal:
        last = (torch.searchsorted(queries.values, key_k, right=True) - 1).clamp(min=0)
        newest = positions[:, :q_len].gather(1, queries.indices.gather(1, last))
        key_k = torch.where(positions[:, q_len:] > newest, q_len, key_k)
    keys = key_k.sort(dim=1, stable=True)

    of_queries = _bounds(queries.values, queries.values, keys.values, q_len)
    # A sequence counts from its first query, if it has a key at all.
    begins = queries.values.diff(dim=1, prepend=queries.values.new_full((queries.values.shape[0], 1), -1)) != 0
    number = ((begins & (of_queries[3] > 0)).cumsum(1) - 1).clamp(min=0)
    of_keys = _bounds(keys.values, queries.values, keys.values, q_len)
    key_number = number.gather(1, of_keys[0].clamp(max=max(q_len - 1, 0)))
    tensors = (queries.indices, keys.indices, number, *of_queries, key_number, *of_keys)
    return DeviceSequences(*(t.to(torch.int32) for t in tensors))


def check_alignment(index: Tensor, q_len: int, k_len: int, causal: bool) -> None:
    """Raise ValueError where the queries of a sequence are not its last tokens, in order. Waits for the device."""
    from .sequences import split_sequences

    split_sequences(index, q_len, k_len, causal)


def _bounds(own: Tensor, queries: Tensor, keys: Tensor, dead: int) -> tuple[Tensor, ...]:
    """First slot and number of queries and of keys of the sequences named `own`; zeros for `dead`."""
    alive = own < dead
    found = []
    for names in (queries, keys):
        first = torch.searchsorted(names, own)
        length = torch.searchsorted(names, own, right=True) - first
        found += [torch.where(alive, first, 0), torch.where(alive, length, 0)]
    return tuple(found)


def _tiles(first: Tensor, length: Tensor, block: int, sequence: tuple[Tensor, ...]) -> Tiles:
    """Cut sequences that occupy slots `first : first + length` into tiles; `sequence` is told per slot."""
    batch, slots = first.shape
    slot = torch.arange(slots, device=first.device, dtype=torch.int32).expand(batch, slots)
    rank = slot - first
    starts = (rank % block == 0) & (length > 0)
    # Tiles void at the end go to one spare column that is cut off.
    column = torch.where(starts, starts.cumsum(1) - 1, slots)
    values = (slot, (length - rank).clamp(max=block), rank // block, *sequence)
    tables = (v.new_zeros(batch, slots + 1).scatter_(1, column, v)[:, :slots] for v in values)
    return Tiles(starts.sum(1, dtype=torch.int32), *(t.contiguous() for t in tables))
