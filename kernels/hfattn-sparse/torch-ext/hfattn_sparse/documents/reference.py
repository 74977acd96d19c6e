"""Attention of a prompt of documents under one dense mask: the specification."""

from __future__ import annotations

from torch import Tensor

from ..masked import masked_attention


def visible(table: Tensor) -> Tensor:
    """Which keys each query sees, bool `[B, 1, N, N]`.

    Real query i in segment a and real key j <= i in segment b: a == b, or b is the prefix, or a is the reader.

    Args:
        table: int32 `[B, 3, N]`: segment (-1 padding), position (rising over the row), role (0 prefix, 1 document,
            2 reader).
    """
    segment, position, role = table.unbind(1)
    same = segment[:, :, None] == segment[:, None]
    allowed = same | (role == 0)[:, None] | (role == 2)[:, :, None]
    real = segment >= 0
    earlier = position[:, None] <= position[:, :, None]
    return (allowed & earlier & real[:, None] & real[:, :, None])[:, None]


def forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """`[B, Hq, N, D]`, `[B, H, N, D]`, `[B, H, N, Dv]` -> `[B, Hq, N, Dv]`; rows that are not real give 0."""
    return masked_attention(query, key, value, visible(table), scale=scale)[0]
