"""Channel-wise maximum and minimum of the keys of every logical page (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_statistics(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Statistics of pages without a token, `[..., 2, D]`: `[..., 0, :]` = -inf (kmax), `[..., 1, :]` = inf (kmin)."""
    stats = torch.full(shape, float("-inf"), dtype=dtype, device=device)
    stats[..., 1, :] = float("inf")
    return stats


def update_statistics(stats: Tensor, key: Tensor, first: int, logical_page_size: int) -> None:
    """Take `n` new keys into the statistics, in place.

    Args:
        stats: `[B, H, logical pages, 2, D]`.
        key: `[B, H, n, D]`, unquantised, the tokens at positions `first`, `first + 1`, ...
    """
    count, size = key.shape[2], logical_page_size
    if count == 0:
        return
    start = first // size
    if count == 1:
        at = stats[:, :, start]
        torch.maximum(at[:, :, 0], key[:, :, 0].to(stats.dtype), out=at[:, :, 0])
        torch.minimum(at[:, :, 1], key[:, :, 0].to(stats.dtype), out=at[:, :, 1])
        return
    # Whole pages are pooled in one step; the partial ones before and after them apart.
    head = min(-first % size, count)
    whole = (count - head) // size * size
    pieces = []
    if head:
        pieces.append((start, key[:, :, None, :head]))
    if whole:
        pieces.append(((first + head) // size, key[:, :, head : head + whole].unflatten(2, (-1, size))))
    if head + whole < count:
        pieces.append(((first + head + whole) // size, key[:, :, None, head + whole :]))
    for page, keys in pieces:
        at = stats[:, :, page : page + keys.shape[2]]
        torch.maximum(at[:, :, :, 0], keys.amax(3).to(stats.dtype), out=at[:, :, :, 0])
        torch.minimum(at[:, :, :, 1], keys.amin(3).to(stats.dtype), out=at[:, :, :, 1])


def page_statistics(key: Tensor, page_size: int, logical_page_size: int) -> tuple[Tensor, Tensor]:
    """Statistics of whole rows at once.

    Args:
        key: `[B, H, N, D]`.
        page_size, logical_page_size: tokens; the first is a multiple of the second.

    Returns `[B, H, ceil(N / page_size), page_size / logical_page_size, 2, D]` (kmax, kmin; -inf and inf where a logical
    page holds no token) and the number of tokens in each logical page, int64 `[pages, logical]`.
    """
    length = key.shape[2]
    pages, logical = -(-length // page_size), page_size // logical_page_size
    bounds = []
    for fill, reduce in ((float("-inf"), torch.amax), (float("inf"), torch.amin)):
        padded = torch.nn.functional.pad(key, (0, 0, 0, pages * page_size - length), value=fill)
        bounds.append(reduce(padded.unflatten(2, (pages, logical, logical_page_size)), 4))
    return torch.stack(bounds, -2), tokens_of_pages(length, page_size, logical_page_size, key.device)


def tokens_of_pages(length: int, page_size: int, logical_page_size: int, device: torch.device) -> Tensor:
    """Number of tokens in each logical page of a row, int64 `[pages, logical]`."""
    pages, logical = -(-length // page_size), page_size // logical_page_size
    starts = torch.arange(pages * logical, device=device) * logical_page_size
    return (length - starts).clamp(0, logical_page_size).view(pages, logical)
