"""Where landmarks go: one after every `block_size - 1` real tokens of a stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Expanded(NamedTuple):
    """A batch with its landmarks, rows at the left.

    ids, positions: int64 `[B, W]`; positions count landmarks and restart with every segment.
    segment: int64 `[B, W]`, the packed sequence of a token, -1 behind the row's end.
    source: int64 `[B, T]`, where every given token went.
    lengths: tokens of every row, landmarks included.
    """

    ids: Tensor
    positions: Tensor
    segment: Tensor
    source: Tensor
    lengths: list[int]


def expand(ids: Tensor, segment: Tensor, before: Tensor, block_size: int, landmark: int) -> Expanded:
    """Insert landmarks.

    Args:
        ids: int64 `[B, T]`.
        segment: int64 `[B, T]`, the sequence a token belongs to (contiguous), -1 for padding.
        before: int64 `[B]`, real tokens of the row's sequence that came in earlier calls.
        block_size: tokens of a block, its landmark included.
        landmark: id of the landmark.
    """
    real = segment >= 0
    place = real.cumsum(1) - 1
    starts = real & torch.cat([torch.ones_like(real[:, :1]), segment[:, 1:] != segment[:, :-1]], 1)
    # Real tokens before the first of each segment: the running maximum of where segments start.
    first = torch.where(starts, place, 0).cummax(1).values
    rank = before[:, None] + place - first
    regular = block_size - 1
    completes = real & (rank % regular == regular - 1)
    size = real.long() + completes.long()
    source = size.cumsum(1) - size
    lengths = size.sum(1).tolist()
    width = max(lengths, default=0)
    position = rank + rank // regular

    # One column more than needed takes what is not there.
    table = ids.new_zeros(3, ids.shape[0], width + 1)
    table[2] = -1
    where = torch.where(real, source, width)
    after = torch.where(completes, source + 1, width)
    for row, (values, ends) in enumerate(
        ((ids, torch.full_like(ids, landmark)), (position, position + 1), (segment, segment))
    ):
        table[row].scatter_(1, where, values.to(ids.dtype)).scatter_(1, after, ends.to(ids.dtype))
    table = table[..., :width]
    return Expanded(table[0], table[1], table[2], source.clamp(max=max(width - 1, 0)), lengths)


def chunks(length: int, open_tokens: int, block_size: int, chunk: int) -> list[int]:
    """Sizes of the calls that feed `length` tokens behind a cache whose open block holds `open_tokens`.

    The first fills the open block, as a chunk may not run past its end; the others take `chunk` tokens.
    """
    sizes = []
    if open_tokens and length:
        sizes.append(min(block_size - open_tokens, length))
    rest = length - sum(sizes)
    return sizes + [min(chunk, rest - start) for start in range(0, rest, chunk)]
