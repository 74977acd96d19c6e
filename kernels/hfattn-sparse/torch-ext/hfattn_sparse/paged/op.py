"""The ops of paged decoding with plain tensors for arguments, on the torch path and as the reference."""

from __future__ import annotations

from torch import Tensor

from . import reference, selection, statistics, torch_path
from .pages import Pages

page_statistics = page_statistics_reference = statistics.page_statistics


def page_scores(query: Tensor, stats: Tensor, logical: bool) -> Tensor:
    """Scores of physical, or of logical pages; see `selection`."""
    return (selection.logical_scores if logical else selection.page_scores)(query, stats)


page_scores_reference = page_scores


def paged_attention_reference(
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
    """`reference.paged_attention` with the fields of `Pages` one by one."""
    stored = Pages(key, key_scale, key_zero, key_bits), Pages(value, value_scale, value_zero, value_bits)
    current = None if current_key is None else (current_key, current_value)
    window = None if recent is None else (sinks, recent)
    return reference.paged_attention(query, *stored, pages, length, scale, current, slots, window)


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
    """`torch_path.paged_attention` with the fields of `Pages` one by one."""
    stored = Pages(key, key_scale, key_zero, key_bits), Pages(value, value_scale, value_zero, value_bits)
    current = None if current_key is None else (current_key, current_value)
    window = None if recent is None else (sinks, recent)
    return torch_path.paged_attention(query, *stored, pages, length, scale, current, slots, window)
