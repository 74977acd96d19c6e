"""From a token index to plain sequences: every sparse op runs on slices that hold one sequence each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor

# Tags of ops that cut sequences or lists on the host: a CUDA graph would replay the first call's decisions.
HOST_SYNC = (torch.Tag.cudagraph_unsafe,)


class Sequence(NamedTuple):
    """One sequence of a call: `query[batch][:, :, q]` aligns with the end of `key[batch][:, :, k]`.

    batch: slice of rows (more than one row when all of them have the same layout); q, k: slices, or int64 indices when
    the sequence's tokens are not contiguous; number: ordinal over the call; row: first batch row.
    """

    batch: slice
    q: Rows
    k: Rows
    number: int
    row: int


def split_sequences(index: Tensor | None, q_len: int, k_len: int, causal: bool) -> list[Sequence]:
    """List the sequences of a token index int32 `[B, 2, q_len + k_len]` (row 0 sequence id or -1, row 1 position).

    Keys that no query can see under causal attention (slots of a static cache that are not filled yet) are left out.
    Reads the index on the host. Raises ValueError when the queries of a sequence are not its last tokens.
    """
    if index is None:
        return [Sequence(slice(None), slice(None), slice(None), 0, 0)]
    table = index.cpu()
    rows = table.shape[0]
    if rows > 1 and bool((table == table[:1]).all()) and bool((_runs(table[0, 0, :q_len])[0] >= 0).sum() <= 1):
        found = _row_sequences(table[0], slice(None), 0, 0, q_len, causal)
    else:
        found = []
        for row in range(rows):
            found += _row_sequences(table[row], slice(row, row + 1), row, len(found), q_len, causal)
    return [s._replace(q=_to(s.q, index.device), k=_to(s.k, index.device)) for s in found]


def _row_sequences(table: Tensor, batch: slice, row: int, first: int, q_len: int, causal: bool) -> list[Sequence]:
    queries, keys = _groups(table[0, :q_len]), _groups(table[0, q_len:])
    pos_q, pos_k = table[1, :q_len], table[1, q_len:]
    found = []
    for segment, q in queries.items():
        k = keys.get(segment)
        if k is None:
            continue
        if causal:
            k = _drop_future(k, pos_k, int(pos_q[_last(q)]))
            if k is None:
                continue
            _check_alignment(pos_q[q], pos_k[k])
        found.append(Sequence(batch, q, k, first + len(found), row))
    return found


def _groups(segments: Tensor) -> dict[int, Rows]:
    """Rows of every sequence id >= 0, in order of first appearance: a slice when they are contiguous."""
    ids, starts, ends = _runs(segments)
    runs: dict[int, list[tuple[int, int]]] = {}
    for segment, start, end in zip(ids.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if segment >= 0:
            runs.setdefault(segment, []).append((start, end))
    return {
        segment: slice(*pieces[0]) if len(pieces) == 1 else torch.cat([torch.arange(*piece) for piece in pieces])
        for segment, pieces in runs.items()
    }


def _runs(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, counts = torch.unique_consecutive(segments, return_counts=True)
    ends = counts.cumsum(0)
    return ids, ends - counts, ends


def _last(rows: Rows) -> int:
    return rows.stop - 1 if isinstance(rows, slice) else int(rows[-1])


def _drop_future(k: Rows, pos_k: Tensor, newest: int) -> Rows | None:
    count = int((pos_k[k] <= newest).sum())
    if count == 0:
        return None
    return slice(k.start, k.start + count) if isinstance(k, slice) else k[:count]


def _check_alignment(pos_q: Tensor, pos_k: Tensor) -> None:
    """Queries must be the last tokens of their sequence; when they outnumber the keys, the first ones see none."""
    overlap = min(pos_q.numel(), pos_k.numel())
    ordered = bool((pos_q.diff() > 0).all()) and bool((pos_k.diff() > 0).all())
    if not ordered or not torch.equal(pos_q[-overlap:], pos_k[-overlap:]):
        raise ValueError(
            "sparse attention needs the queries of a sequence to be its last tokens, in order; got query positions "
            f"{pos_q[:8].tolist()}... and last key positions {pos_k[-overlap:][:8].tolist()}.... "
            "Use attn_implementation='sdpa' for this call."
        )


def _to(rows: Rows, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else rows.to(device)


def take(tensor: Tensor, batch: slice, rows: Rows) -> Tensor:
    """Rows of one sequence, `[b, H, n, ...]`: a view when they are contiguous."""
    return tensor[batch, :, rows]
