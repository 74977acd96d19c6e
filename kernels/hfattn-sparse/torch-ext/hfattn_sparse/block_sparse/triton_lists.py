"""Lists of block ids made fit for kernels, on the device: ascending, each id once, unused places at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import UNUSED

# Longer lists are sorted by torch: comparing all pairs grows with the square.
_PAIRWISE = 128


@triton.jit(do_not_specialize=["rows", "length", "num_blocks"])
def unique_kernel(ids, out, rows, length, num_blocks, WIDTH: tl.constexpr):
    """out[row] = the distinct ids 0 <= id < num_blocks of ids[row], ascending, then UNUSED. int [rows, length]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    block = tl.load(ids + row * length + at, mask=at < length, other=-1)
    block = tl.where((block >= 0) & (block < num_blocks), block, UNUSED).to(tl.int32)
    # An id's place is the number of distinct smaller ones.
    same = (block[:, None] == block[None, :]).to(tl.int32)
    first_of_column = tl.sum(same * (at[:, None] < at[None, :]).to(tl.int32), 0) == 0
    first_of_row = tl.sum(same * (at[None, :] < at[:, None]).to(tl.int32), 1) == 0
    smaller = (block[None, :] < block[:, None]) & first_of_column[None, :]
    place = tl.sum(smaller.to(tl.int32), 1)
    used = first_of_row & (block != UNUSED)
    count = tl.sum(used.to(tl.int32), 0)
    tl.store(out + row * length + place, block, mask=used)
    tl.store(out + row * length + at, tl.full([WIDTH], UNUSED, tl.int32), mask=(at >= count) & (at < length))


def unique_lists(indices: Tensor, num_blocks: int) -> Tensor:
    """The distinct ids 0 to num_blocks - 1 of every list, ascending, then 2**31 - 1. int [..., M] -> int32 [..., M]."""
    length = indices.shape[-1]
    if length <= _PAIRWISE:
        indices = indices.contiguous()
        out = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        rows = indices.numel() // max(length, 1)
        width = max(16, triton.next_power_of_2(length))
        options = {"num_warps": max(1, width // 32), "num_stages": 1}
        launch(unique_kernel, (rows,), indices, out, rows, length, num_blocks, WIDTH=width, **options)
        return out
    valid = (indices >= 0) & (indices < num_blocks)
    ordered = torch.where(valid, indices, UNUSED.value).to(torch.int32).sort(-1).values
    ordered[..., 1:].masked_fill_(ordered[..., 1:] == ordered[..., :-1], UNUSED.value)
    return ordered.sort(-1).values


def readers(lists: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Which query blocks read each key block: the inverse of `lists` int32 [P, H, nq, M] from `unique_lists`.

    Returns entries int32 [P, H, nq * M], query blocks ascending key block by key block, and starts int32
    [P, H, num_blocks + 1]: those of key block b are `entries[starts[b] : starts[b + 1]]`.
    """
    rows, heads, _, length = lists.shape
    # A stable sort keeps query blocks in order, so the sums over them have one order too.
    blocks, order = lists.reshape(rows, heads, -1).sort(dim=-1, stable=True)
    bounds = torch.arange(num_blocks + 1, dtype=torch.int32, device=lists.device)
    starts = torch.searchsorted(blocks, bounds.expand(rows, heads, -1).contiguous(), out_int32=True)
    return (order // max(length, 1)).to(torch.int32), starts
