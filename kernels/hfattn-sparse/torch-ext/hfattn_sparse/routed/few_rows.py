"""Routed attention of a handful of rows (decoding): only the keys of their own blocks are read, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .layout import Geometry
from .workspace import Workspace


def applies(routes: torch.Tensor, shape: Geometry) -> bool:
    """Whether copying every row's keys is small next to one pass over all keys."""
    return shape.q_len <= 8 and 2 * shape.q_len * routes.shape[3] * shape.block_size <= shape.k_len


def forward(
    query, key, value, routes, shape: Geometry, scale: float, out: torch.Tensor, lse: torch.Tensor, work: Workspace
) -> None:
    """Fill out [B, Hq, Nq, Dv] and lse [B, Hq, Nq]; clean routes [B, Hq, Nq, K]."""
    inside = torch.arange(shape.block_size, device=routes.device)
    index = (routes[..., None] * shape.block_size + inside).flatten(-2)  # [B, Hq, Nq, K * block_size]
    seen = (index >= 0) & (index < shape.k_len)
    if shape.causal:
        position = torch.arange(shape.offset, shape.k_len, device=routes.device)
        seen &= index <= position[:, None]
    # Fill the gaps with a key that the row reads anyway: others may hold anything, also NaN.
    index = torch.where(seen, index, index.masked_fill(~seen, 0).amax(-1, keepdim=True))

    vectors = (query.to(lse.dtype) * scale)[..., None]
    scores = lse.new_empty(index.shape)
    for b, h, keys in _picked(key, index, work):
        torch.bmm(keys.to(lse.dtype), vectors[b, h], out=scores[b, h][..., None])
    scores.masked_fill_(~seen, -torch.inf)
    torch.logsumexp(scores, -1, out=lse)
    blind = lse == -torch.inf
    weights = scores.sub_(lse.masked_fill(blind, 0.0)[..., None]).exp_()[..., None, :]
    for b, h, values in _picked(value, index, work):
        out[b, h] = torch.bmm(weights[b, h], values.to(lse.dtype))[:, 0]
    out.masked_fill_(blind[..., None], 0.0)


def _picked(tensor: torch.Tensor, index: torch.Tensor, work: Workspace) -> Iterator[tuple[int, int, torch.Tensor]]:
    """For every batch entry and query head the listed rows of [B, Hkv, Nk, D] as scratch [Nq, L, D]."""
    batch, heads, rows, length = index.shape
    group = heads // tensor.shape[1]
    picked = work.take("picked", (rows * length, tensor.shape[-1]), tensor.dtype)
    for b in range(batch):
        for h in range(heads):
            torch.index_select(tensor[b, h // group], 0, index[b, h].view(-1), out=picked)
            yield b, h, picked.view(rows, length, -1)
