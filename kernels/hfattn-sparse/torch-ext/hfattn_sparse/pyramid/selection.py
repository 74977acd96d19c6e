"""Which level every (query block, key block) pair gets: importance, level assignment, similarity cap, protection."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..block_sparse.tiling import Workspace
from .pooling import LEVELS, num_blocks, pad_tokens

# Scores formed at one time: they stay in a core's own cache.
CHUNK_SCORES = 1 << 18
# Tokens sampled of a block are one in this many.
SAMPLE = 4
SEED_OF_HEAD = 49_979_687
NEG_INF = float("-inf")
# Scores up to this are exponentiated as they are.
SAFE_TOP = 40.0
# Halvings of the interval in which `density` looks for its factor on the bounds.
HALVINGS = 12


def choose_levels(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    estimator: str,
    reduce: str,
    stride: int,
    seed: int,
    first_head: int,
    mode: str,
    bounds: list[float],
    min_full: float,
    align_divisor: int,
    similarity: list[float] | None,
    density: float | None,
    text: list[int],
    text_blocks: int,
) -> Tensor:
    """Levels uint8 `[B, Hq, nq, nk]` of one sequence a row.

    Args:
        query, key: `[B, Hq, N, D]`, `[B, Hkv, N, D]`.
        causal: antidiagonal importance, and the forced levels of the prefill variant; else sampled importance.
        density: scale the bounds so that the mean of 1 / level over the pairs comes out like this; None keeps them.
        text: bounds of token spans `[start, stop, start, stop, ...]` that stay at full resolution, as queries and keys.
        text_blocks: last block rows and columns at full resolution (causal).
    """
    nq, nk = num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k)
    device = query.device
    if causal:
        importance = antidiagonal_importance(query, key, block=block_k, stride=stride, scale=scale)
        visible = torch.ones(nq, nk, dtype=torch.bool, device=device).tril()
    else:
        offsets = sample_offsets(query, block_q, block_k, seed, first_head)
        importance = sampled_importance(
            query, key, *offsets, block_q=block_q, block_k=block_k, scale=scale, estimator=estimator, reduce=reduce
        )
        visible = None
    full = protected(nq, nk, block_q, block_k, causal, text, text_blocks, device)
    cap = None
    if similarity is not None:
        cap = similarity_cap(key, block_k=block_k, thresholds=similarity)
        cap = cap.repeat_interleave(query.shape[1] // key.shape[1], 1)
    rule = {"mode": mode, "min_full": min_full, "align_divisor": align_divisor, "visible": visible}
    if density is not None:
        pairs = pair_counts(query.shape[2], key.shape[2], block_q, block_k, causal, device)
        return fit_density(importance, bounds, density, pairs, full, cap, **rule)
    cap = None if cap is None else cap[:, :, None]
    return finish(assign_levels(importance, bounds, **rule), full, cap, visible)


def sample_offsets(query: Tensor, block_q: int, block_k: int, seed: int, first_head: int = 0) -> tuple[Tensor, Tensor]:
    """Offsets inside a block, int64 `[B, H, block / 4]` of queries and of keys, without repeats.

    Every head has a generator of its own, so that its offsets do not depend on which other heads are here.
    """
    batch, heads = query.shape[:2]
    drawn: tuple[list, list] = ([], [])
    generator = torch.Generator()
    for head in range(first_head, first_head + heads):
        generator.manual_seed(seed + SEED_OF_HEAD * head)
        for found, block in zip(drawn, (block_q, block_k), strict=True):
            order = torch.rand(batch, block, generator=generator).argsort(-1)
            found.append(order[:, : max(block // SAMPLE, 1)])
    return tuple(torch.stack(found, 1).to(query.device) for found in drawn)


def sampled_importance(
    query: Tensor,
    key: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    estimator: str,
    reduce: str,
) -> Tensor:
    """S_ij `[B, Hq, nq, nk]`, rows summing to 1: the largest (or mean) p over sampled tokens of blocks i and j.

    p is the softmax over all sampled keys ("softmax"), or exp(score - row maximum) ("rowmax"). fp32 (fp64 for fp64).
    An offset past the end of a partial last block reads the last token. Half precision rounds the scores.
    """
    if _native(query, key, offsets_k, scale, estimator, reduce):
        tokens = [
            _sample_rows(offsets.flatten(0, 1)[:, None], num_blocks(x.shape[2], block), block, x.shape[2])
            for offsets, x, block in ((offsets_q, query, block_q), (offsets_k, key, block_k))
        ]
        out = native.importance(query, key, *(x.unflatten(0, query.shape[:2]) for x in tokens), scale)
        return out.div_(out.sum(-1, keepdim=True))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads = query.shape[:2]
    ratio = heads // key.shape[1]
    # Half precision only ranks samples: its own products are exact enough, and several times faster.
    product = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else dtype
    nq, nk = num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k)
    out = torch.empty(batch, heads, nq, nk, dtype=dtype, device=query.device)
    sq, sk = offsets_q.shape[2], offsets_k.shape[2]
    step = max(1, CHUNK_SCORES // (sq * sk * nk))
    work = Workspace()
    for b in range(batch):
        for h in range(heads):
            # Keys by offset, then block: a reduction over offsets then runs along contiguous blocks.
            where = _sample_rows(offsets_k[b, h], nk, block_k, key.shape[2]).T.flatten()
            keys = key[b, h // ratio].index_select(0, where).to(product).T
            where = _sample_rows(offsets_q[b, h], nq, block_q, query.shape[2])
            rows = query[b, h].index_select(0, where.flatten()).to(dtype).mul_(scale).to(product)
            for start, part in zip(range(0, nq, step), rows.split(step * sq), strict=True):
                shape = (len(part), sk * nk)
                scores = torch.mm(part, keys, out=work.get("scores", shape, product, part.device))
                part = _block_scores(scores.to(dtype).view(-1, sk, nk), estimator, reduce).view(-1, sq, nk)
                out[b, h, start : start + step] = part.amax(1) if reduce == "max" else part.mean(1)
    return out.div_(out.sum(-1, keepdim=True))


def _native(query: Tensor, key: Tensor, offsets_k: Tensor, scale: float, estimator: str, reduce: str) -> bool:
    """Whether the compiled kernel weighs the samples: it knows the released rule only."""
    released = (estimator, reduce) == ("softmax", "max") and offsets_k.shape[2] <= native.MOST_SAMPLES
    return released and native.possible(query, key, key, scale) and native.pays(query, key)


def _sample_rows(offsets: Tensor, blocks: int, block: int, length: int) -> Tensor:
    """Token of every sampled offset in every block, int64 `[..., blocks, samples]` of offsets `[..., 1, samples]`."""
    rows = torch.arange(blocks, device=offsets.device)[:, None] * block + offsets
    return rows.clamp(max=length - 1)


def _block_scores(scores: Tensor, estimator: str, reduce: str) -> Tensor:
    """scores [rows, samples, blocks] -> the row's largest (mean) p in every block, [rows, blocks]; scores are lost."""
    best = scores.amax(1)
    top = best.amax(1, keepdim=True)
    if estimator == "rowmax" and reduce == "max":
        return best.sub_(top).exp_()
    if estimator == "softmax" and bool((top.abs() <= SAFE_TOP).all()):
        top.zero_()  # a pass over the scores less: nothing overflows, and nothing that counts is lost
    else:
        scores.sub_(top[:, None])
    weights = scores.exp_()
    total = weights.flatten(1).sum(1, keepdim=True) if estimator == "softmax" else 1
    return (best.sub_(top).exp_() if reduce == "max" else weights.mean(1)).div_(total)


def antidiagonal_importance(query: Tensor, key: Tensor, *, block: int, stride: int, scale: float) -> Tensor:
    """Causal importance `[B, Hq, n, n]` by antidiagonal sums (XAttention), rows not normalised.

    score(g, g') = scale / t * sum_u q[g t + t - 1 - u].k[g' t + u] over groups of t = `stride` tokens; softmax over
    groups g' <= g; S_ij is the sum over the groups of blocks i and j. Needs as many queries as keys. fp32 (fp64).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, length, dim = query.shape
    ratio, n, per_block = heads // key.shape[1], num_blocks(length, block), block // stride
    groups = n * per_block
    out = torch.zeros(batch, heads, n, n, dtype=dtype, device=query.device)
    filled = torch.arange(groups, device=query.device) * stride < length
    step = max(1, CHUNK_SCORES // (groups * per_block))
    for b in range(batch):
        for h in range(heads):
            rows = pad_tokens(query[b, h], block, "exact").to(dtype).reshape(groups, stride, dim).flip(1).flatten(1)
            keys = pad_tokens(key[b, h // ratio], block, "exact").to(dtype).reshape(groups, stride * dim)
            for start in range(0, n, step):
                stop = min(start + step, n)
                at, end = slice(start * per_block, stop * per_block), stop * per_block
                scores = (rows[at] @ keys[:end].T).mul_(scale / stride)
                own = torch.arange(at.start, end, device=query.device)[:, None]
                scores.masked_fill_(torch.arange(end, device=query.device) > own, NEG_INF)
                probs = scores.softmax(-1).mul_(filled[at, None]).view(-1, stop, per_block).sum(-1)
                out[b, h, start:stop, :stop] = probs.view(-1, per_block, stop).sum(1)
    return out


def assign_levels(
    importance: Tensor,
    bounds: list[float],
    *,
    mode: str,
    min_full: float,
    align_divisor: int,
    visible: Tensor | None = None,
) -> Tensor:
    """Levels uint8 `[..., nq, nk]` from importances of the same shape, before caps and protection (psa.md 2.4, 2.6).

    Blocks are taken by falling importance, earlier ones first on ties; c is the share of the row gathered so far.
    "threshold": level r up to and including the block that crosses bound r. "energybound": the smallest r with
    0 < c <= bound r. "quantile": the first `int(n * bound_r)` blocks, n the number of blocks a row may see.

    Args:
        bounds: four numbers in [0, 1], rising, for levels 1, 2, 4, 8.
        min_full: "threshold" gives level 1 to `int(min_full * n) + 1` blocks at least.
        align_divisor: round the number of blocks of a level to multiples of `ceil(level / align_divisor)`; 0 = not.
        visible: bool `[nq, nk]`, blocks a row may see; None = all.
    """
    order, share, valid = _rank(importance, visible)
    ends = _ends(share, valid, torch.tensor(bounds, dtype=share.dtype), mode, min_full, align_divisor)
    return torch.zeros_like(order, dtype=torch.uint8).scatter_(-1, order, _paint(ends, share.shape[-1]))


def _rank(importance: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks by falling importance, the share of the row's sum gathered so far, and how many blocks a row may see."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    sums = importance.gather(-1, order).double().cumsum(-1)
    valid = torch.full(importance.shape[-2:-1], importance.shape[-1], device=importance.device)
    if visible is not None:
        valid = visible.sum(-1)
    return order, sums / sums[..., -1:].clamp(min=1e-300), valid


def _ends(share: Tensor, valid: Tensor, bounds: Tensor, mode: str, min_full: float, align_divisor: int) -> Tensor:
    """Where levels end in the order of falling importance: position `[..., nq, 5]`, the first entry is where 1 starts.

    Bounds `[4]`, or `[B, H, 1, 4]` for bounds by head.
    """
    bounds = bounds.expand(*share.shape[:-1], 4)
    first = torch.zeros(*share.shape[:-1], 1, dtype=torch.int64, device=share.device)
    if mode == "quantile":
        reached = (valid.double()[:, None] * bounds).long()
    else:
        # How many entries of the rising shares are not above a bound.
        limits = bounds + 1e-6 if mode == "threshold" else bounds
        reached = torch.searchsorted(share.contiguous(), limits.contiguous(), right=True)
        if mode == "energybound":
            # A bound of 1 means every block, however its sum was rounded; nothing is chosen from an empty row.
            reached = torch.where(bounds >= 1, share.shape[-1], reached)
            first = (share == 0).sum(-1, keepdim=True)
    if mode == "threshold":
        reached = torch.where(reached > 0, reached + 1, 0)
        reached[..., 0] = reached[..., 0].maximum((valid.double() * min_full).long() + 1)
    ends = torch.cat([first, reached], -1).cummax(-1)[0]
    if mode == "energybound":
        return ends
    ends = torch.minimum(ends, valid[:, None])
    return _aligned(ends, reached, valid, align_divisor) if align_divisor else ends


def _aligned(ends: Tensor, reached: Tensor, valid: Tensor, align_divisor: int) -> Tensor:
    """The same with the number of blocks of level r rounded to multiples of `ceil(r / align_divisor)`."""
    out = [ends[..., 0]]
    for number, level in enumerate(LEVELS):
        start = out[-1]
        end, multiple = torch.minimum(torch.maximum(reached[..., number], start), valid), -(-level // align_divisor)
        if multiple > 1:
            length = end - start
            up = -(-length // multiple) * multiple
            end = start + torch.where(start + up > valid, length // multiple * multiple, up)
        out.append(end)
    return torch.stack(out, -1)


def _paint(ends: Tensor, blocks: int) -> Tensor:
    """Levels uint8 `[..., nq, blocks]` of positions, from `_ends`."""
    position = torch.arange(blocks, device=ends.device)
    levels = torch.zeros(*ends.shape[:-1], blocks, dtype=torch.uint8, device=ends.device)
    for level, start, end in zip(LEVELS, ends.unbind(-1)[:-1], ends.unbind(-1)[1:], strict=True):
        levels.masked_fill_((position >= start[..., None]) & (position < end[..., None]), level)
    return levels


def similarity_cap(key: Tensor, *, block_k: int, thresholds: list[float]) -> Tensor:
    """Coarsest level that the keys of a block are alike enough for, uint8 `[B, Hkv, nk]`.

    sim_r is the mean cosine of the first and the last token of every group of r = 2, 4, 8; the cap is the largest r
    with sim_r > its threshold, else 1. The partial last block is filled with its last token.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    blocks = pad_tokens(key, block_k, "replicate").to(dtype).unflatten(2, (-1, block_k))
    cap = torch.ones(blocks.shape[:3], dtype=torch.uint8, device=key.device)
    for level, threshold in zip(LEVELS[1:], thresholds, strict=True):
        first, last = blocks[..., 0::level, :], blocks[..., level - 1 :: level, :]
        alike = torch.cosine_similarity(first, last, dim=-1).mean(-1)
        cap.masked_fill_(alike > threshold, level)
    return cap


def protected(
    nq: int, nk: int, block_q: int, block_k: int, causal: bool, text: list[int], text_blocks: int, device
) -> Tensor | None:
    """Pairs that are forced to level 1, bool `[nq, nk]`, or None: text, and for causal the diagonal and column 0."""
    if not causal and not text:
        return None
    full = torch.zeros(nq, nk, dtype=torch.bool, device=device)
    for start, stop in zip(text[::2], text[1::2], strict=True):
        if stop > start:  # cut off at the last block by indexing
            full[start // block_q : num_blocks(stop, block_q)] = True
            full[:, start // block_k : num_blocks(stop, block_k)] = True
    if causal:
        if text_blocks:
            full[max(nq - text_blocks, 0) :] = True
            full[:, max(nk - text_blocks, 0) :] = True
        full.fill_diagonal_(True)
        full[:, :1] = True
        full = full.tril()
    return full


def finish(levels: Tensor, full: Tensor | None, cap: Tensor | None, visible: Tensor | None) -> Tensor:
    """Hide what is not visible, force what is protected, and cap the rest; all of them broadcast to the levels."""
    if visible is not None:
        levels = levels.masked_fill(~visible, 0)
    if full is not None:
        levels = levels.masked_fill(full, 1)
    return levels if cap is None else torch.minimum(levels, cap)


def pair_counts(q_len: int, k_len: int, block_q: int, block_k: int, causal: bool, device) -> Tensor:
    """(query, key) pairs that dense attention computes in every block, fp64 `[nq, nk]`; as many queries as keys."""
    first_q, first_k = (torch.arange(0, n, b, device=device) for n, b in ((q_len, block_q), (k_len, block_k)))
    keys = (k_len - first_k).clamp(max=block_k)
    if not causal:
        return (q_len - first_q).clamp(max=block_q).double().outer(keys.double())
    row = torch.arange(q_len, device=device)
    pairs = (row[:, None] + 1 - first_k).clamp(min=0).minimum(keys).double()
    out = torch.zeros(len(first_q), len(first_k), dtype=torch.float64, device=device)
    return out.index_add_(0, row // block_q, pairs)


def cost(levels: Tensor, pairs: Tensor) -> Tensor:
    """Pairs computed under levels `[..., nq, nk]`, a pooled key counting 1 / r, fp64 `[...]`."""
    return _work(levels, pairs).sum((-2, -1))


def _work(levels: Tensor, pairs: Tensor) -> Tensor:
    """The same for every block, fp64 `[..., nq, nk]`."""
    inverse = torch.zeros(9, dtype=torch.float64, device=levels.device)
    inverse[list(LEVELS)] = torch.tensor([1 / level for level in LEVELS], dtype=torch.float64, device=levels.device)
    return inverse[levels.long()] * pairs


def fit_density(
    importance: Tensor,
    bounds: list[float],
    density: float,
    pairs: Tensor,
    full: Tensor | None,
    cap: Tensor | None,
    visible: Tensor | None,
    **rule,
) -> Tensor:
    """Levels whose cost is `density` of all pairs: bounds times a factor that bisection finds, at most 1 each.

    Every head of every row has its own factor, so that it does not depend on what else is in the batch or the process.
    """
    order, share, valid = _rank(importance, visible)
    wanted = density * pairs.sum()
    # Everything in the order of importance, so that a step of the search moves nothing.
    pairs, full, visible = (
        None if x is None else x.expand(order.shape).gather(-1, order) for x in (pairs, full, visible)
    )
    if cap is not None:
        cap = cap[:, :, None].expand(order.shape).gather(-1, order)
    # What the first positions of a row cost if all of them had one level; levels change at five places of a row, so a
    # step of the search reads five differences.
    same = (torch.full(order.shape, level, dtype=torch.uint8, device=order.device) for level in (0, *LEVELS, 0))
    sums = torch.stack([_work(finish(x, full, cap, visible), pairs).cumsum(-1) for x in same], -2)
    changes = torch.nn.functional.pad(sums[..., :-1, :] - sums[..., 1:, :], (1, 0))
    none = sums[..., 0, -1].sum(-1)[..., None, None]

    def cost_at(ends: Tensor) -> Tensor:
        return none + changes.gather(-1, ends[..., None]).sum((-3, -2))[..., None]

    limits = torch.tensor(bounds, dtype=torch.float64, device=importance.device)
    low = torch.zeros(*importance.shape[:-2], 1, 1, dtype=torch.float64, device=importance.device)
    high = torch.full_like(low, 1 / max(min(b for b in bounds if b > 0), 1e-3))
    best, best_miss = None, None
    for factor in (low, high, *[None] * HALVINGS):
        middle = (low + high) / 2 if factor is None else factor
        ends = _ends(share, valid, (middle * limits).clamp(max=1.0), **rule)
        miss = cost_at(ends) - wanted
        if factor is None:
            low, high = torch.where(miss < 0, middle, low), torch.where(miss < 0, high, middle)
        best = ends if best is None else torch.where(miss.abs() < best_miss, ends, best)
        best_miss = miss.abs() if best_miss is None else torch.minimum(miss.abs(), best_miss)
    levels = finish(_paint(best, order.shape[-1]), full, cap, visible)
    return torch.zeros_like(levels).scatter_(-1, order, levels)
