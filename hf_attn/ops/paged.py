"""Paged decoding: key statistics, page scores, page selection, and attention over lists of pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int
from hf_attn.ops.backend import choose_path
from hf_attn.ops.hfattn_sparse.counters import count
from hf_attn.ops.hfattn_sparse.paged import op
from hf_attn.ops.hfattn_sparse.paged.pages import Pages


def page_statistics(key: Tensor, *, page_size: int, logical_page_size: int) -> tuple[Tensor, Tensor]:
    """Channel-wise maximum and minimum of the keys of every logical page (Quest, arXiv 2406.10774).

    Args:
        key: `[B, H, N, D]`, position encoding applied, unquantised.
        page_size, logical_page_size: tokens, >= 1; the first is a multiple of the second.

    Returns:
        stats `[B, H, ceil(N / page_size), page_size / logical_page_size, 2, D]` in the key's dtype: kmax at index 0 and
        kmin at index 1 of the fifth dimension (-inf and inf where a logical page holds no token), and the number of
        tokens of every logical page, int64 `[pages, logical]`. Not differentiable.

    Raises ValueError for keys and page sizes that do not fit.
    """
    if key.dim() != 4 or not key.is_floating_point():
        raise ValueError(f"key must be floating [batch, heads, tokens, head_dim], got {tuple(key.shape)} {key.dtype}")
    require_int("logical_page_size", logical_page_size, 1)
    require_int("page_size", page_size, 1)
    if page_size % logical_page_size:
        raise ValueError(f"page_size must be a multiple of logical_page_size, got {page_size} and {logical_page_size}")
    return _form("page_statistics", key, key.shape[3])(key.detach(), page_size, logical_page_size)


def page_scores(query: Tensor, stats: Tensor, *, logical: bool = False) -> Tensor:
    """Upper bound of q.k over each page's keys: the best of its logical pages (LServe, arXiv 2502.14866, eq. 2).

    Args:
        query: `[B, Hq, D]`, one token a row, position encoding applied; not scaled.
        stats: `[B, H, pages, G, 2, D]` as `page_statistics` gives them; `Hq % H == 0`.
        logical: give the scores of the logical pages.

    Returns fp32 (fp64 for fp64 queries) `[B, Hq, pages]`, with `logical` `[B, Hq, pages, G]`; -inf where there is no
    token. Not differentiable.

    Raises ValueError for shapes that do not fit.
    """
    if query.dim() != 3 or stats.dim() != 6 or stats.shape[4] != 2 or stats.shape[5] != query.shape[2]:
        raise ValueError(
            f"query must be [batch, heads, D] and stats [batch, heads, pages, logical, 2, D], got {tuple(query.shape)} "
            f"and {tuple(stats.shape)}"
        )
    if query.shape[0] != stats.shape[0] or query.shape[1] % stats.shape[1]:
        raise ValueError(
            f"query and stats must agree in batch, and {query.shape[1]} query heads be a multiple of "
            f"{stats.shape[1]} heads; got {tuple(query.shape)} and {tuple(stats.shape)}"
        )
    return _form("page_scores", query, query.shape[2])(query.detach(), stats.detach(), logical)


def select_pages(scores: Tensor, last: Tensor, *, count: int) -> Tensor:
    """The `count` best pages before page `last` of every head.

    Args:
        scores: `[B, H, pages]`.
        last: int64 `[B]`: the page of the newest cached token; it and later pages are not chosen.
        count: pages, >= 0.

    Returns int64 `[B, H, min(count, pages)]` in no order, -1 where there are fewer. On equal scores the later page
    wins.

    Raises ValueError for shapes that do not fit.
    """
    require_int("count", count, 0)
    if scores.dim() != 3 or last.shape != scores.shape[:1] or last.is_floating_point():
        raise ValueError(
            f"scores must be [batch, heads, pages] and last an integer tensor [batch], got {tuple(scores.shape)} and "
            f"{tuple(last.shape)} {last.dtype}"
        )
    from hf_attn.ops.hfattn_sparse.paged import selection

    return selection.select_pages(scores, last, count)


def paged_attention(
    query: Tensor,
    key: Pages,
    value: Pages,
    pages: Tensor,
    *,
    length: Tensor,
    scale: float | None = None,
    current: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """softmax(scale * q.k) v of one query a row over the tokens of the listed pages; only those pages are read.

    Args:
        query: `[B, Hq, D]`.
        key, value: storage of `[B, H, n, P, D]` and `[B, H, n, P, Dv]`, floating or quantised; `Hq % H == 0`.
        pages: int64 `[B, H | Hq, W]`, -1 padded, no page twice: one list a KV head or one a query head.
        length: int64 `[B]`: tokens from this number on are not read.
        scale: factor on the scores, default `D ** -0.5`.
        current: the newest token (number `length - 1`) unquantised, `[B, H, D]` and `[B, H, Dv]`; it replaces what the
            storage holds there, and counts where its page is listed.
        slots: int64 `[B, n, P]`: number of the token in every place, -1 for none (a ring buffer); None: in order. With
            `current` the storage need not hold the newest token, which takes part in any case.
        window: (sinks, recent), >= 0: of the tokens only the first `sinks` and the last `recent` are read.

    Returns `[B, Hq, Dv]` in the query's dtype, 0 for rows without a token. Not differentiable in the storage. Raises
    ValueError for shapes that do not fit.
    """
    batch, heads = key.data.shape[:2]
    if query.dim() != 3 or query.shape[0] != batch or query.shape[1] % heads or query.shape[2] != key.head_dim:
        raise ValueError(
            f"query must be [{batch}, a multiple of {heads} heads, {key.head_dim}], got {tuple(query.shape)}"
        )
    if key.data.shape[:4] != value.data.shape[:4]:
        raise ValueError(f"key and value pages differ: {tuple(key.data.shape)} and {tuple(value.data.shape)}")
    if pages.dim() != 3 or pages.shape[0] != batch or pages.shape[1] not in (heads, query.shape[1]):
        raise ValueError(f"pages must be [{batch}, {heads} or {query.shape[1]}, W], got {tuple(pages.shape)}")
    if length.shape != (batch,) or length.is_floating_point():
        raise ValueError(f"length must be an integer tensor [{batch}], got {tuple(length.shape)} {length.dtype}")
    if slots is not None and (slots.shape != (batch, *key.data.shape[2:4]) or slots.is_floating_point()):
        expected = [batch, *key.data.shape[2:4]]
        raise ValueError(f"slots must be an integer tensor {expected}, got {tuple(slots.shape)} {slots.dtype}")
    if window is not None:
        require_int("window[0]", window[0], 0)
        require_int("window[1]", window[1], 0)
    run = _form("paged_attention", query, query.shape[2], value.head_dim)
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    newest = (None, None) if current is None else current
    with torch.no_grad():
        return run(query, *key, *value, pages, length, scale, *newest, slots, *(window or (0, None)))


def _form(name: str, query: Tensor, *head_dims: int) -> Callable[..., Any]:
    """The function that computes an op on the path it takes, with plain tensors for arguments."""
    path = choose_path(name, query, *head_dims)
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.paged import triton_op

        return getattr(triton_op, name)
    if not torch.compiler.is_compiling():
        count(name, path)
    return getattr(op, f"{name}_reference" if path == "reference" else name)
