"""Which pages a query reads: an upper bound of its scores from the key statistics, then the best pages."""

from __future__ import annotations

import torch
from torch import Tensor


def logical_scores(query: Tensor, stats: Tensor) -> Tensor:
    """Upper bound of q.k over the keys of every logical page, fp32 (fp64 for fp64), `[B, Hq, pages, G]`.

    sum_c max(q_c kmax_c, q_c kmin_c) = relu(q).kmax + min(q, 0).kmin (LServe, arXiv 2502.14866 eq. 2); -inf for pages
    without a token.

    Args:
        query: `[B, Hq, D]`.
        stats: `[B, H, pages, G, 2, D]`, query head h reads head `h // (Hq // H)`.
    """
    batch, heads, pages, logical, _, dim = stats.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = query.to(dtype).reshape(batch * heads, -1, dim)
    both = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)
    # Statistics of the first pages of a larger cache are no plain matrix over rows and heads; of one row they are.
    table = stats[0].flatten(1, 2).flatten(2) if batch == 1 else stats.reshape(batch * heads, pages * logical, 2 * dim)
    table = table.to(dtype)
    scores = torch.bmm(both, table.mT)
    # 0 * inf is not a number; a page without a token has -inf in every channel.
    empty = torch.isneginf(table[:, None, :, 0])
    scores = scores.masked_fill(empty, float("-inf"))
    return scores.view(batch, -1, pages, logical)


def page_scores(query: Tensor, stats: Tensor) -> Tensor:
    """The best logical page of every physical page, `[B, Hq, pages]`; arguments as `logical_scores`."""
    return logical_scores(query, stats).amax(-1)


def select_pages(scores: Tensor, last: Tensor, count: int) -> Tensor:
    """The best `count` pages before page `last`, int64 `[B, H, min(count, pages)]`, -1 padded, in no order.

    Args:
        scores: `[B, H, pages]`.
        last: int `[B]`; pages from here on take no part.
        count: pages, >= 0. On equal scores the later page wins.
    """
    pages = scores.shape[2]
    count = min(count, pages)
    # Compiled code and GPUs do not look at the scores, which would wait for the device.
    looks = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and count and len(ends := set(last.tolist())) == 1:
        found = _clear_choice(scores, min(ends.pop(), pages), count)
        if found is not None:
            return found
    number = torch.arange(pages, device=scores.device)
    # A page before `last` always holds tokens; its score is finite or NaN, and NaN counts as the worst.
    scores = torch.where(number < last[:, None, None], scores.nan_to_num(nan=-3e38, neginf=-3e38), float("-inf"))
    if count == 0:
        return scores.new_empty(*scores.shape[:2], 0, dtype=torch.int64)
    if looks or count == pages:
        found = scores.topk(count, sorted=False)
        if count == pages or not _tied(scores, found.values):
            return torch.where(torch.isneginf(found.values), -1, found.indices)
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    return torch.where(torch.isneginf(order.values), -1, pages - 1 - order.indices)[..., :count]


def _clear_choice(scores: Tensor, end: int, count: int) -> Tensor | None:
    """The best `count` of the first `end` pages of every row; None where equal scores or NaN leave the choice open."""
    if count >= end:
        return None
    values, found = scores.narrow(2, 0, end).topk(count + 1)
    # NaN comes first, and compares as neither larger nor equal.
    clear = (values[..., count - 1] > values[..., count]) & (values[..., 0] == values[..., 0])
    return found[..., :count] if bool(clear.all()) else None


def _tied(scores: Tensor, chosen: Tensor) -> bool:
    """Whether the choice among equal scores is open."""
    worst = chosen.amin(-1, keepdim=True)
    return bool((((scores >= worst) & ~torch.isneginf(scores)).sum(-1) > chosen.shape[-1]).any())
