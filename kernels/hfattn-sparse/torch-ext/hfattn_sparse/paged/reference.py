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
    slots: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """softmax(scale * q.k) v over the tokens of the listed pages, one query a row; arguments as the torch path."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.data.shape[1]
    keys, values = (x.dense().to(dtype).flatten(2, 3) for x in (key, value))  # [B, H, tokens, D]
    place = torch.arange(keys.shape[2], device=query.device)
    listed = (pages[..., None] == place // key.page_size).any(2)  # [B, H or Hq, places]
    tokens = place.expand(query.shape[0], -1) if slots is None else slots.flatten(1)
    if current is not None and slots is not None:
        # A place of its own for the newest token.
        keys, values = (
            torch.cat([x, new.to(dtype)[:, :, None]], 2) for x, new in zip((keys, values), current, strict=True)
        )
        tokens = torch.cat([tokens.masked_fill(tokens == length[:, None] - 1, -1), length[:, None] - 1], 1)
        listed = torch.cat([listed, torch.ones_like(listed[..., :1])], 2)
    elif current is not None:
        newest = (tokens == length[:, None] - 1)[:, None, :, None]
        keys, values = (
            torch.where(newest, new.to(dtype)[:, :, None], x) for x, new in zip((keys, values), current, strict=True)
        )
    seen = (tokens >= 0) & (tokens < length[:, None])
    if window is not None:
        seen &= (tokens < window[0]) | (tokens >= length[:, None] - window[1])
    listed = listed.repeat_interleave(query.shape[1] // pages.shape[1], 1) & seen[:, None]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("bhd,bhnd->bhn", query.to(dtype), keys) * scale
    weights = scores.masked_fill(~listed, float("-inf")).softmax(-1).masked_fill(~listed, 0.0)
    values = torch.where(listed[..., None], values, 0.0)
    return torch.einsum("bhn,bhnd->bhd", weights, values).to(query.dtype)
