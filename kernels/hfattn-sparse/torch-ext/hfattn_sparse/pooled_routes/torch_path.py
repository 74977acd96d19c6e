"""Fast choice of key blocks from pools of scores.

Pools of many pairs are cut by a histogram: only the pairs in the bin that holds the limit are sorted. Pools of single
queries go through a sorting network over thousands of queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routed.ranking import GROUP_MULTIPLE, top_rows
from ..routed.routing import block_centroids
from ..routed.workspace import Workspace
from . import reference

BINS = 4096


def block_scores(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """As the reference."""
    means = block_centroids(key, block_size)
    if query.shape[1] != key.shape[1]:
        means = means.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return means @ query.to(means.dtype).mT


def select(scores: Tensor, own: Tensor, *, rule: str, scope: str, amount: float) -> Tensor:
    """As the reference. Overwrites `scores`."""
    everything = (rule == "threshold" and amount >= 1) or (rule == "top_k" and amount >= scores.shape[2])
    by_histogram = scope != "query_head" and scores.device.type == "cpu"
    if everything or not scores.numel() or not (by_histogram or (rule == "top_k" and scope == "query_head")):
        return reference.select(scores, own, rule=rule, scope=scope, amount=amount)
    own = own.to(scores.device)
    if scope == "query_head":
        return _best_of_queries(scores, own, amount)
    mine = reference.own_pairs(own, scores)
    values, owned = reference.to_pools(scores, scope), reference.to_pools(mine, scope)
    if rule == "threshold":
        rows = [_by_share(*pool, amount) for pool in zip(reference.normalised(values), owned, strict=True)]
    else:
        counts = reference.top_counts(scores.shape, scope, amount, own.device).tolist()
        rows = [_by_count(*pool) for pool in zip(values, owned, counts, strict=True)]
    return reference.from_pools(torch.stack(rows), scope, scores.shape)


def _by_share(similarity: Tensor, owned: Tensor, tau: float) -> Tensor:
    """Chosen pairs of one pool, bool `[L]`: the fewest that hold the share `tau` with the own ones, and those."""
    total = similarity.sum(dtype=torch.float64) + reference.FLAT
    covered = torch.where(owned, similarity, 0).sum(dtype=torch.float64)
    target = float((tau * total - covered).clamp(min=0))
    bins = _bins(similarity, owned, 0.0, 1.0)
    number = torch.bincount(bins, minlength=BINS + 1)[:BINS].flip(0).cumsum(0)
    share = torch.bincount(bins, similarity.double(), minlength=BINS + 1)[:BINS].flip(0).cumsum(0)
    reached = (share >= target) & (number > 0)
    if not bool(reached.any()):
        return torch.ones_like(owned)
    place = int(reached.int().argmax())
    limit, before = BINS - 1 - place, float(share[place - 1]) if place else 0.0
    inside = (bins == limit).nonzero().view(-1)
    ranked = similarity[inside].sort(descending=True, stable=True)
    enough = before + ranked.values.cumsum(0, dtype=torch.float64) >= target
    last = int(enough.int().argmax()) if bool(enough.any()) else inside.numel() - 1
    chosen = bins > limit  # own pairs lie beyond the last bin
    chosen[inside[ranked.indices[: last + 1]]] = True
    return chosen


def _by_count(values: Tensor, owned: Tensor, count: int) -> Tensor:
    """Chosen pairs of one pool, bool `[L]`: the own ones, and the best of the others up to `count` in all."""
    low, high = (float(x) for x in values.aminmax())
    bins = _bins(values, owned, low, high)
    number = torch.bincount(bins, minlength=BINS + 1).flip(0).cumsum(0)  # own pairs are the first of all
    place = int((number >= count).int().argmax())
    limit = BINS - place
    if limit == BINS:
        return owned.clone()
    inside = (bins == limit).nonzero().view(-1)
    ranked = values[inside].argsort(descending=True, stable=True)
    chosen = bins > limit
    chosen[inside[ranked[: count - int(number[place - 1])]]] = True
    return chosen


def _bins(values: Tensor, owned: Tensor, low: float, high: float) -> Tensor:
    """Bin int32 of every pair, rising with its value; `BINS` for own pairs."""
    scale = BINS / (high - low) if high > low else 0.0
    bins = values.sub(low).mul_(scale).to(torch.int32).clamp_(0, BINS - 1)
    return bins.masked_fill_(owned, BINS)


def _best_of_queries(scores: Tensor, own: Tensor, amount: float) -> Tensor:
    """Every query's own block and the best others, bool `[B, H, n, N]`."""
    batch, heads, blocks, queries = scores.shape
    counts = reference.top_counts((1, 1, blocks, queries), "query_head", amount, own.device)
    scores[:, :, own, torch.arange(queries, device=own.device)] = torch.inf
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    work = Workspace(scores.device)
    padded = -(-blocks // GROUP_MULTIPLE) * GROUP_MULTIPLE
    table = scores.new_full((padded, queries), -torch.inf)
    backwards = torch.arange(blocks - 1, -1, -1, device=scores.device)
    most = int(counts.amax())
    fewer = counts < most
    uneven = bool(fewer.any())
    for b in range(batch):
        for h in range(heads):
            # The last of equal rows wins there, the first is to win here.
            torch.index_select(scores[b, h], 0, backwards, out=table[padded - blocks :])
            best = padded - 1 - top_rows(table, most, work)
            mask = chosen[b, h].scatter_(0, best, True)
            if uneven:  # these queries give their worst block back, the last of equal ones
                values = scores[b, h].gather(0, best)
                worst = torch.where(values == values.amin(0), best, -1).amax(0, keepdim=True)
                mask.scatter_(0, worst, mask.gather(0, worst) & ~fewer)
    return chosen
