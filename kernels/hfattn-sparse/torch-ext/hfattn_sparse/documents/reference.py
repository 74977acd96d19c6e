"""Attention of a prompt of documents under one dense mask: the specification."""

from __future__ import annotations

from torch import Tensor

from ..masked import masked_attention


def visible(table: Tensor, rows: Tensor | None = None) -> Tensor:
    """Which keys each query sees, bool `[B, 1, N, N]`, or `[B, 1, n, N]` of the queries at `rows` `[n]`.

    Real query i in segment a and real key j <= i in segment b: a == b, or b is the prefix, or a is the reader.

    Args:
        table: int32 `[B, 3, N]`: segment (-1 padding), position (rising over the row), role (0 prefix, 1 document,
            2 reader).
    """
    segment, position, role = table[:, :, None].unbind(1)
    own_segment, own_position, own_role = (table if rows is None else table[..., rows])[..., None].unbind(1)
    allowed = (own_segment == segment) | (role == 0) | (own_role == 2)
    real = (segment >= 0) & (own_segment >= 0)
    return (allowed & (position <= own_position) & real)[:, None]


def forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """`[B, Hq, N, D]`, `[B, H, N, D]`, `[B, H, N, Dv]` -> `[B, Hq, N, Dv]`; rows that are not real give 0."""
    return masked_attention(query, key, value, visible(table), scale=scale)[0]
