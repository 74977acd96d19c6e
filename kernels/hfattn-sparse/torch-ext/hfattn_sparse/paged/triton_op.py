"""Paged decoding by Triton kernels as custom ops, with the arguments of those in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .pages import Pages
from .statistics import tokens_of_pages


@torch.library.custom_op(add_op_namespace_prefix("page_statistics_triton"), mutates_args=())
def page_statistics(key: Tensor, page_size: int, logical_page_size: int) -> tuple[Tensor, Tensor]:
    """As `statistics.page_statistics`."""
    from . import triton_path

    count("page_statistics", "triton")
    stats = triton_path.page_statistics(key, page_size, logical_page_size)
    return stats, tokens_of_pages(key.shape[2], page_size, logical_page_size, key.device)


@page_statistics.register_fake
def _(key, page_size, logical_page_size):
    shape = ((key.shape[2] + page_size - 1) // page_size, page_size // logical_page_size)
    stats = key.new_empty(*key.shape[:2], *shape, 2, key.shape[3])
    return stats, key.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op(add_op_namespace_prefix("page_scores_triton"), mutates_args=())
def page_scores(query: Tensor, stats: Tensor, logical: bool) -> Tensor:
    """As `op.page_scores`, always fp32."""
    from . import triton_path

    count("page_scores", "triton")
    if not logical:
        return triton_path.page_scores(query, stats)
    # Every logical page as a page of its own.
    return triton_path.page_scores(query, stats.flatten(2, 3)[:, :, :, None]).unflatten(2, stats.shape[2:4])


@page_scores.register_fake
def _(query, stats, logical):
    return query.new_empty(*query.shape[:2], *stats.shape[2 : 4 if logical else 3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("paged_attention_triton"), mutates_args=())
def paged_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    key_bits: int | None,
    value: Tensor,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    value_bits: int | None,
    pages: Tensor,
    length: Tensor,
    scale: float,
    current_key: Tensor | None,
    current_value: Tensor | None,
    slots: Tensor | None,
    sinks: int,
    recent: int | None,
) -> Tensor:
    """As `op.paged_attention`; page numbers that do not exist are ignored."""
    from . import triton_path

    count("paged_attention", "triton")
    stored = Pages(key, key_scale, key_zero, key_bits), Pages(value, value_scale, value_zero, value_bits)
    current = None if current_key is None else (current_key, current_value)
    window = None if recent is None else (sinks, recent)
    return triton_path.paged_attention(query, *stored, pages, length, scale, current, slots, window)


@paged_attention.register_fake
def _(
    query, key, key_scale, key_zero, key_bits, value, value_scale, value_zero, value_bits, pages, length, scale,
    current_key, current_value, slots, sinks, recent,
):  # fmt: skip
    return query.new_empty(*query.shape[:2], value.shape[4] * (2 if value_bits == 4 else 1))
