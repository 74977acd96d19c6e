"""Routed attention that is not causal, by the compiled CPU kernel: the rows of a head that read a block are a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .layout import Geometry

# Decoding reads few keys, and the kernel's lanes would be empty: `few_rows` is as fast there, or faster by far.
FEWEST_ROWS = 9


def takes(query: Tensor, key: Tensor, value: Tensor, shape: Geometry, scale: float) -> bool:
    """Whether the compiled kernel computes this call, short of one that is dense."""
    if native.obstacle(query, key, value, scale) is not None:
        return False
    if shape.causal:
        native.refuse("routed_block_attention has no compiled kernel for causal calls")
        return False
    return native.wanted() or (shape.q_len >= FEWEST_ROWS and native.pays(query, value))


def forward(query, key, value, routes: Tensor, shape: Geometry, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`; routes int, where a block may be repeated, or bool.

    No row touches a key that it does not read, so no result has to be checked for what hidden keys hold.
    """
    chosen = _chosen(routes, shape.num_blocks)
    native.attend_routed(query, key, value, chosen, shape.block_size, scale, out, lse)


def _chosen(routes: Tensor, num_blocks: int) -> Tensor:
    """Bool `[B, Hq, n, Nq]`, the last two dimensions contiguous."""
    if routes.dtype == torch.bool:
        return routes.mT.contiguous()
    batch, heads, rows, _ = routes.shape
    mask = torch.zeros(batch, heads, num_blocks + 1, rows, dtype=torch.bool)
    mask.scatter_(2, torch.where(routes < 0, num_blocks, routes).mT.long(), True)
    return mask[:, :, :num_blocks]
