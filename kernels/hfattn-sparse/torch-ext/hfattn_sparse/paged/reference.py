"""Paged decode attention written as its definition: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import Pages


def paged_attention(
    query: Tensor,
    key: Pages,
    value: Pages,
    pages: Tensor,
    length: Tensor,
    scale: float,
    current: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q.k) v over the tokens of the listed pages, one query a row; arguments as the torch path."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.data.shape[1]
    keys, values = (x.dense().to(dtype).flatten(2, 3) for x in (key, value))  # [B, H, tokens, D]
    tokens = torch.arange(keys.shape[2], device=query.device)
    if current is not None:
        newest = (tokens == length[:, None] - 1)[:, None, :, None]
        keys = torch.where(newest, current[0].to(dtype)[:, :, None], keys)
        values = torch.where(newest, current[1].to(dtype)[:, :, None], values)
    listed = (pages[..., None] == tokens // key.page_size).any(2)  # [B, H or Hq, tokens]
    listed = listed.repeat_interleave(query.shape[1] // pages.shape[1], 1) & (tokens < length[:, None, None])
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("bhd,bhnd->bhn", query.to(dtype), keys) * scale
    weights = scores.masked_fill(~listed, float("-inf")).softmax(-1).masked_fill(~listed, 0.0)
    values = torch.where(listed[..., None], values, 0.0)
    return torch.einsum("bhn,bhnd->bhd", weights, values).to(query.dtype)
