"""Neighborhood attention by torch's FlexAttention: forward and backward, no relative bias, no key padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..counters import count
from .geometry import Window, axis_windows


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, windows: tuple[Window, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `reference.forward` without rpb and key_mask. Runs eagerly (and slowly) unless the
    caller compiles it; differentiable through both results where FlexAttention is."""
    count("neighborhood_attention", "flex")
    extra = key.shape[1] - query.shape[1]
    mask = block_mask(windows, extra, query.device)
    tensors = (x.transpose(1, 2) for x in (query, key, value))
    gqa = query.shape[2] != key.shape[2]
    out, aux = flex_attention(*tensors, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=_request())
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def block_mask(windows: tuple[Window, ...], extra: int, device: torch.device | str) -> BlockMask:
    """The windows as FlexAttention wants them; the last `extra` keys are seen by every query."""
    tables = [[x.to(device) for x in axis_windows(window)] for window in windows]
    total = math.prod(window.length for window in windows)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = k >= total
        found = ~inside
        where = torch.where(inside, 0, k)
        for window, (group, low, high) in zip(reversed(windows), reversed(tables), strict=True):
            i, j = q % window.length, where % window.length
            place = j // window.dilation
            found = found & (group[i] == j % window.dilation) & (low[i] <= place) & (place < high[i])
            q, where = q // window.length, where // window.length
        return found | inside

    return create_block_mask(sees, None, None, total, total + extra, device=str(device))


def _request():
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)
