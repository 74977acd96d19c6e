"""Rows of unequal length in one batch: real tokens first, the rest behind them; and what of them is carried on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def real_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Order int64 `[B, N]` that brings the real tokens of every row to its front, and their number int64 `[B]`."""
    return (~mask).to(torch.int8).argsort(dim=1, stable=True), mask.sum(1)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `[B, n]` of `[B, N, D]`."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))


def put(tensor: Tensor, index: Tensor, length: int) -> Tensor:
    """The reverse of `take`: `[B, length, D]`, 0 where `index` does not point."""
    into = tensor.new_zeros(tensor.shape[0], length, tensor.shape[2])
    return into.scatter(1, index[..., None].expand_as(tensor), tensor)


def tail(past: Tensor | None, new: Tensor, lengths: Tensor | None, keep: int) -> Tensor:
    """The last `keep` real tokens of every row, `[B, keep, ...]` and in front zeros where there are fewer.

    Args:
        past: `[B, <= keep, ...]`, what was kept before, its newest token last.
        new: `[B, n, ...]`; the first `lengths` `[B]` are real, all of them for None.
    """
    if past is None or past.shape[1] < keep:
        missing = keep - (0 if past is None else past.shape[1])
        empty = new.new_zeros(new.shape[0], missing, *new.shape[2:])
        past = empty if past is None else torch.cat([empty, past], 1)
    joined = torch.cat([past, new], 1)
    if lengths is None:
        return joined[:, joined.shape[1] - keep :]
    index = lengths[:, None] + torch.arange(keep, device=new.device)
    index = index.view(*index.shape, *[1] * (new.dim() - 2)).expand(-1, -1, *new.shape[2:])
    return joined.gather(1, index)


def real(lengths: Tensor | None, count: int) -> Tensor | None:
    """Bool `[B, count]`, true for the first `lengths` tokens of a row; None when all are real."""
    return None if lengths is None else torch.arange(count, device=lengths.device) < lengths[:, None]


def causal_convolution(stream: Tensor, weight: Tensor, past: Tensor | None) -> Tensor:
    """Depthwise over `[B, N, D]` with `[D, K]`, the last tap for the token itself; `past`: the K - 1 tokens before."""
    taps, length = weight.shape[1], stream.shape[1]
    stream = pad(stream, (0, 0, taps - 1, 0)) if past is None else torch.cat([past.to(stream.dtype), stream], 1)
    out = stream[:, taps - 1 :] * weight[:, taps - 1]
    for tap in range(taps - 1):
        out = torch.addcmul(out, stream[:, tap : tap + length], weight[:, tap])
    return out
