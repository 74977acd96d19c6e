"""Block selection in plain torch: runs of query blocks, so that no full matrix of scores exists."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..routed.routing import block_centroids
from .rule import LARGEST, Rule, listed

# Scores of one step: enough for long vector operations, few enough that a step needs some tens of megabytes.
_SCORES_PER_STEP = 1 << 21


@torch.no_grad()
def select_blocks(query: Tensor, key: Tensor, rule: Rule, *, scale: float, width: int) -> Tensor:
    """Key blocks of every query block of one sequence; arguments and result as in `reference.select_blocks`."""
    batch, q_heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    queries = block_centroids(query, rule.block_q).view(batch, kv_heads, q_heads // kv_heads, -1, dim)
    keys = block_centroids(key, rule.block_k).mul_(scale)
    rows, blocks = queries.shape[3], keys.shape[2]
    visible, forced = rule.visible_and_forced(q_len, k_len, query.device)
    lists = torch.empty(batch, q_heads, rows, min(width, blocks), dtype=torch.int32, device=query.device)
    step = max(1, _SCORES_PER_STEP // max(1, batch * q_heads * blocks))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = (queries[:, :, :, part].flatten(2, 3) @ keys.mT).view(batch, q_heads, -1, blocks)
        scores = scores.nan_to_num_(-LARGEST, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
        lists[:, :, part] = listed(_choose(scores, visible[part], forced[part], rule), width)
    return lists


def _choose(scores: Tensor, visible: Tensor, forced: Tensor, rule: Rule) -> Tensor:
    """The chosen blocks, bool; scores `[B, H, rows, n]` are overwritten."""
    scores.masked_fill_(~visible, -torch.inf)
    blocks, available = scores.shape[-1], visible.sum(-1, keepdim=True)
    weights = None
    if rule.name in ("threshold", "cumulative"):
        weights = scores.softmax(-1).masked_fill_(~visible, 0)
    if rule.name == "threshold":
        kept = weights >= rule.amount
        best = blocks - 1 - scores.masked_fill(forced, torch.inf).flip(-1).argmax(-1, keepdim=True)
        return kept.scatter_(-1, best, True).logical_or_(forced).logical_and_(visible)
    # Later blocks come first, and a stable sort leaves them there among equals.
    order = scores.masked_fill_(forced, torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = blocks - 1 - order
    rank = torch.arange(blocks, device=scores.device)
    if rule.name == "cumulative":
        before = pad(weights.gather(-1, order).cumsum(-1)[..., :-1], (1, 0))
        kept = before < rule.amount if rule.amount < 1 else torch.ones_like(visible)
    else:
        kept = rank < (int(rule.amount) if rule.name == "top_k" else rule.density_count(available))
    kept = (kept & (rank < available)).expand_as(scores)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept).logical_or_(forced)
