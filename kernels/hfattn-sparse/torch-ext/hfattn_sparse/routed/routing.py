"""Which key blocks every query row attends: block means, the routing rule and the key-block-major layout."""

from __future__ import annotations

import torch

from .ranking import GROUP_MULTIPLE, sort_rows, top_rows
from .workspace import Workspace

# Scores of one routing step: enough columns for long vector operations, few enough to stay near the cache.
_SCORES_PER_STEP = 1 << 20
_ROWS_PER_STEP = 4096


def block_centroids(key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mean of the keys of every block, the last one over the keys it has.

    Args:
        key: [B, Hkv, Nk, D], any strides.
        block_size: keys per block, >= 1.

    Returns:
        [B, Hkv, ceil(Nk / block_size), D], float32 (float64 for float64), accumulated in that type.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    length = key.shape[2]
    whole = length // block_size
    means = key.new_empty((*key.shape[:2], -(-length // block_size), key.shape[3]), dtype=dtype)
    if whole:
        means[:, :, :whole] = key[:, :, : whole * block_size].unflatten(2, (whole, block_size)).mean(3, dtype=dtype)
    if length % block_size:
        means[:, :, whole] = key[:, :, whole * block_size :].mean(2, dtype=dtype)
    return means


def select_routes(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    route_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Blocks every query row attends, by the product of the query with the mean key of a block (not scaled).

    Causal: row r has position r + Nk - Nq (bottom-right alignment); its own block p = position // block_size is always
    chosen, with the best min(top_k - 1, p) blocks before it. Not causal: the best min(top_k, n) of all n blocks.
    On equal scores the later block wins. Not differentiable.

    Args:
        query: [B, Hq, Nq, D], any strides.
        key: [B, Hkv, Nk, D], Hq a multiple of Hkv; head h reads key head h // (Hq // Hkv).
        block_size: keys per block, >= 1.
        top_k: blocks per row, the own one included, >= 1.
        causal: see above.
        route_dtype: round the block means to this type before scoring, as some implementations do. None keeps
            float32 (float64 for float64 inputs); torch.float64 scores in float64.

    Returns:
        int32 [B, Hq, Nq, K], K = min(top_k, n), ascending block numbers, then -1.
        Rows before the first key (position < 0) are all -1.
    """
    if block_size < 1 or top_k < 1:
        raise ValueError(f"block_size and top_k must be >= 1, got block_size={block_size} and top_k={top_k}")
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    width = min(top_k, -(-length // block_size))
    routes = torch.full((batch, heads, rows, width), -1, dtype=torch.int32, device=query.device)
    first = max(0, rows - length) if causal else 0
    if width == 0 or first >= rows:
        return routes
    with torch.no_grad():
        means = block_centroids(key, block_size)
        if route_dtype is not None:
            score_dtype = torch.float64 if route_dtype == torch.float64 else means.dtype
            means = means.to(route_dtype).to(score_dtype)
        group = heads // kv_heads
        work = Workspace(query.device)
        for b in range(batch):
            for h in range(kv_heads):
                of_group = slice(h * group, (h + 1) * group)
                _route_group(
                    query[b, of_group, first:],
                    means[b, h],
                    routes[b, of_group, first:],
                    block_size,
                    length - rows + first if causal else None,
                    work,
                )
    return routes


def _route_group(
    query: torch.Tensor,
    means: torch.Tensor,
    routes: torch.Tensor,
    block_size: int,
    offset: int | None,
    work: Workspace,
) -> None:
    """Fill routes [g, N, K] of the heads that share the block means [n, D]; offset: position of row 0, or None."""
    group, rows, dim = query.shape
    step = max(1, min(_ROWS_PER_STEP, _SCORES_PER_STEP // means.shape[0]) // group)
    step = max(step, min(rows, 64))
    for start in reversed(range(0, rows, step)):  # the last rows see most blocks: scratch memory never grows
        count = min(step, rows - start)
        chunk = work.take("query", (group, count, dim), means.dtype).copy_(query[:, start : start + count])
        chunk = chunk.view(-1, dim)
        if offset is None:
            ids = top_rows(_scores(means, chunk, work), routes.shape[-1], work).unbind(0)
            ids, missing = sort_rows([row.clone() for row in ids]), None
        else:
            position = torch.arange(start + offset, start + offset + count, device=query.device).repeat(group)
            ids, missing = _causal_choice(means, chunk, position // block_size, routes.shape[-1], work)
        chosen = torch.stack(ids)
        if missing is not None:
            chosen.masked_fill_(chosen == missing, -1)
        routes[:, start : start + count] = chosen.view(-1, group, count).permute(1, 2, 0)


def _causal_choice(
    means: torch.Tensor, query: torch.Tensor, own: torch.Tensor, width: int, work: Workspace
) -> tuple[list[torch.Tensor], int]:
    """Own blocks [C] and the best blocks before them: `width` sorted rows [C], with `missing` where there is none."""
    missing = means.shape[0]
    lowest, highest = int(own[0]), int(own[-1])
    if highest < width:  # room for every block
        return [torch.where(own >= block, block, missing) for block in range(width)], missing
    if width == 1:
        return [own], missing
    scores = _scores(means[:highest], query, work)
    number = torch.arange(lowest, scores.shape[0], device=own.device)
    scores[lowest:].masked_fill_(number[:, None] >= own, -torch.inf)
    taken = min(width - 1, highest)
    best = top_rows(scores, taken, work)
    best.masked_fill_(best >= own, missing)
    spare = [torch.full_like(own, missing)] * (width - 1 - taken)
    return sort_rows([*best.unbind(0), own.clone()]) + spare, missing


def _scores(means: torch.Tensor, query: torch.Tensor, work: Workspace) -> torch.Tensor:
    """[n, D], [C, D] -> [n, C], filled up with rows of -inf to the multiple that `top_rows` takes in groups."""
    rows = means.shape[0]
    padded = -(-rows // GROUP_MULTIPLE) * GROUP_MULTIPLE
    scores = work.take("scores", (padded, query.shape[0]), means.dtype)
    torch.mm(means, query.t(), out=scores[:rows])
    scores[rows:] = -torch.inf
    return scores


def to_key_block_major(routes: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn per-row choices around: for every block the rows that chose it.

    Args:
        routes: int [B, Hq, Nq, K], -1 where a row has fewer blocks, any order, no block twice in a row.
        num_blocks: n.

    Returns:
        col_offsets int64 [B, Hq, n] and col_nnz int32 [B, Hq, n]: segment of `row_indices` that belongs to a block
        (an empty one has offset 0); row_indices int32 [sum]: row numbers, ascending in every segment, segments in
        the order (batch, head, block).
    """
    batch, heads, rows, width = routes.shape
    segment = torch.arange(batch * heads, device=routes.device).view(batch, heads, 1, 1) * num_blocks
    sentinel = batch * heads * num_blocks
    keys = torch.where(routes >= 0, routes + segment, sentinel).reshape(-1)
    keys, order = keys.sort(dim=-1, stable=True)
    ends = torch.searchsorted(keys, torch.arange(1, sentinel + 1, device=keys.device, dtype=keys.dtype))
    starts = torch.cat([ends.new_zeros(1), ends])[:-1]
    counts = ends - starts
    used = int(ends[-1]) if sentinel else 0
    row_indices = (order[:used] // max(width, 1) % max(rows, 1)).to(torch.int32)
    shape = (batch, heads, num_blocks)
    return starts.masked_fill(counts == 0, 0).view(shape), counts.to(torch.int32).view(shape), row_indices
