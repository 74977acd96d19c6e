"""Block selection, the specification: block means, one matrix of scores, one sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rule import LARGEST, Rule, listed


def select_blocks(query: Tensor, key: Tensor, rule: Rule, *, scale: float, width: int) -> Tensor:
    """Key blocks of every query block of one sequence.

    score[i, j] = scale * mean(queries of block i) . mean(keys of block j), in fp32 (fp64 for fp64 inputs); weight[i] is
    the softmax of score[i] over the visible blocks. `Rule` says what is kept.

    Args:
        query: `[B, Hq, Nq, D]`; key: `[B, Hkv, Nk, D]`; query block i stands at positions from `i * block_q + Nk - Nq`.
        width: longest list, `rule.width` of the longest sequence of the call.

    Returns:
        int32 `[B, Hq, ceil(Nq / block_q), min(width, ceil(Nk / block_k))]`, ascending, -1 padded.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries = torch.stack([piece.mean(2) for piece in query.to(dtype).split(rule.block_q, 2)], 2)
    keys = torch.stack([piece.mean(2) for piece in key.to(dtype).split(rule.block_k, 2)], 2)
    scores = queries @ keys.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    scores = scores.nan_to_num(-LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
    visible, forced = rule.visible_and_forced(query.shape[2], key.shape[2], query.device)

    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)
    order = scores.masked_fill(~visible, float("-inf")).masked_fill(forced, float("inf"))
    # Flipping puts later blocks first, and a stable sort keeps that order among equals.
    order = scores.shape[-1] - 1 - order.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=query.device)
    count = visible.sum(-1, keepdim=True)
    sorted_weights = weights.gather(-1, order)
    if rule.name == "top_k":
        kept = rank < min(int(rule.amount), scores.shape[-1])
    elif rule.name == "density":
        kept = rank < rule.density_count(count)
    elif rule.name == "threshold":
        kept = sorted_weights >= rule.amount
    else:
        before = pad(sorted_weights.cumsum(-1)[..., :-1], (1, 0))
        kept = (before < rule.amount) | torch.tensor(rule.amount >= 1, device=query.device)
    kept = (kept | (rank == 0)) & (rank < count)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept.expand_as(scores))
    return listed(chosen | forced, width)
