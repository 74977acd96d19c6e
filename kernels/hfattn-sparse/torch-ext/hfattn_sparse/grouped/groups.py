"""Where the blocks of a sequence lie: one table, whether landmarks come at a fixed distance or anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Blocks of one sequence.

    places: int64 `[n, w]`, keys of the regular tokens of every block, -1 where it has fewer than `w`.
    landmarks: int64 `[n]`, the key of the block's landmark; -1 for the open last block and for blocks without a
        regular token, whose landmark nobody sees.
    block: int64 `[Nq]`, the block of every query row, -1 before the first key.
    offset: the key of query row 0, k_len - q_len.
    ragged: whether `places` may hold -1 in any block but the last.
    """

    places: Tensor
    landmarks: Tensor
    block: Tensor
    offset: int
    ragged: bool


def regular_groups(block_size: int, q_len: int, k_len: int, device: torch.device) -> Groups:
    """A landmark at the end of every `block_size` keys."""
    count = -(-k_len // block_size)
    keys = torch.arange(count * block_size, device=device).view(count, block_size)
    keys = torch.where(keys < k_len, keys, -1)
    rows = torch.arange(k_len - q_len, k_len, device=device)
    block = torch.where(rows >= 0, rows // block_size, -1)
    return Groups(keys[:, :-1], keys[:, -1], block, k_len - q_len, False)


def groups_of(landmarks: Tensor, q_len: int) -> Groups:
    """Blocks that end where `landmarks` bool `[Nk]` says. Reads the flags on the host."""
    k_len, device = landmarks.shape[0], landmarks.device
    block = landmarks.long().cumsum(0) - landmarks.long()
    count = int(block[-1]) + 1 if k_len else 0
    sizes = torch.zeros(count, dtype=torch.long, device=device).index_add_(0, block, (~landmarks).long())
    width = max(int(sizes.max()) if count else 0, 1)
    regular = (~landmarks).nonzero()[:, 0]
    number = block[regular]
    rank = torch.arange(regular.numel(), device=device) - (sizes.cumsum(0) - sizes)[number]
    places = torch.full((count, width), -1, dtype=torch.long, device=device)
    places[number, rank] = regular
    ends = torch.full((count,), -1, dtype=torch.long, device=device)
    found = landmarks.nonzero()[:, 0]
    ends[block[found]] = found
    ends = torch.where(sizes > 0, ends, -1)
    rows = torch.arange(k_len - q_len, k_len, device=device)
    own = block[rows.clamp(min=0)] if k_len else rows
    return Groups(places, ends, torch.where(rows >= 0, own, -1), k_len - q_len, True)
