"""Neighborhood attention under dense masks: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import masked_attention
from .geometry import Window, bias_places, visible, window_places


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    *,
    windows: tuple[Window, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j softmax_j(scale q_i k_j + rpb[j - i]) v_j over the window of i and all extra tokens.

    Args:
        query: `[B, N, Hq, D]`, N the tokens of the grid, last axis fastest.
        key, value: `[B, N + M, Hkv, D]`, `[B, N + M, Hkv, Dv]`; the last M tokens lie off the grid, every query sees
            them.
        rpb: `[Hq, 2 K - 1, ...]`, one axis a grid axis, added to the scaled scores of grid keys.
        key_mask: bool `[B, N + M]`, False hides a key.
        windows: of each axis.

    Returns out `[B, N, Hq, Dv]` in the query's dtype and lse `[B, N, Hq]` in fp32 (fp64 for fp64 inputs); a row that
    sees no key gives 0 and -inf. Differentiable.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    extra = key.shape[2] - query.shape[2]
    allowed = torch.nn.functional.pad(visible(windows).to(query.device), (0, extra), value=True)[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    bias = None
    if rpb is not None:
        places = bias_places(windows).to(query.device)
        bias = torch.nn.functional.pad(rpb.flatten(1)[:, places], (0, extra))[None]
    out, lse = masked_attention(query, key, value, allowed, scale=scale, bias=bias)
    return out.transpose(1, 2), lse.transpose(1, 2)


def scores(query: Tensor, key: Tensor, rpb: Tensor | None, *, windows: tuple[Window, ...]) -> Tensor:
    """q_i k_j + rpb[j - i] of every window slot, `[B, H, N, prod K]`; slots without a key give -inf.

    query, key: `[B, H, N, D]`; rpb as in `forward`. Scores are not scaled.
    """
    places, real = (x.to(query.device) for x in window_places(windows))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    dense = query.to(dtype) @ key.to(dtype).mT
    if rpb is not None:
        dense = dense + rpb.to(dtype).flatten(1)[:, bias_places(windows).to(query.device)]
    picked = dense.gather(-1, places.expand(*dense.shape[:2], -1, -1))
    return picked.masked_fill(~real, float("-inf")).to(query.dtype)


def weighted_values(weights: Tensor, value: Tensor, *, windows: tuple[Window, ...]) -> Tensor:
    """sum over window slots of weight times value, `[B, H, N, Dv]`; weights `[B, H, N, prod K]`, value `[B, H, N, Dv]`.

    Weights of slots without a key count as 0.
    """
    places, real = (x.to(value.device) for x in window_places(windows))
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    real_weights = weights.to(dtype).masked_fill(~real, 0)
    size = value.shape[2]
    dense = real_weights.new_zeros(*weights.shape[:3], size)
    dense = dense.scatter_add(-1, places.expand_as(weights), real_weights)
    return (dense @ value.to(dtype)).to(value.dtype)
