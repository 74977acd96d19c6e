"""Keys that say themselves which experts chose them, so that any cache and attention keeps to the choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# Added to the score of a key that its expert did not choose: exp of it is 0 next to any real score, and half precision
# holds the product with 1 / scale.
UNCHOSEN = -3000.0
# Key features added beside a cache: one for each expert that may read the key says whether the key was chosen by it.
# Fused kernels want a multiple of 8.
EXTRA = 8


def mark(key: Tensor, chosen: Tensor) -> Tensor:
    """Keys `[B, H, N, D + extra]` with one more feature for each expert that may read them, and zeros.

    chosen: bool `[B, H, experts that share the KV head, N]`.
    """
    marks = torch.where(chosen, 0.0, UNCHOSEN).to(key.dtype).transpose(2, 3)
    return torch.cat([key, marks, key.new_zeros(*key.shape[:3], _features(chosen) - marks.shape[3])], -1)


def asking(query: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Queries `[B, Hq, N, D + extra]` to whose scores, times `scale`, the mark of their own expert is added."""
    share, features = chosen.shape[2], _features(chosen)
    expert = torch.arange(query.shape[1], device=query.device) // (query.shape[1] // (chosen.shape[1] * share))
    own = one_hot(expert % share, features).to(query.dtype) / scale
    return torch.cat([query, own[None, :, None].expand(*query.shape[:3], features)], -1)


def _features(chosen: Tensor) -> int:
    return -(-chosen.shape[2] // EXTRA) * EXTRA
