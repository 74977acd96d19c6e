"""Arguments of neighborhood attention: one entry an axis, and messages that name the axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# An integer for all axes, or one entry an axis.
Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}
# Space, kernel size, stride, dilation and causality, one entry an axis.
Geometry = tuple[list[int], list[int], list[int], list[int], list[bool]]


def geometry_of(space: Sequence[int], kernel_size: Sizes, stride: Sizes, dilation: Sizes, is_causal: Flags) -> Geometry:
    """Checked, one entry an axis.

    Raises ValueError for windows that do not fit the grid, naming the axis.
    """
    names = _AXES[len(space)]
    kernel, strides, dilations = (
        _per_axis(name, value, len(space), int)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    causal = _per_axis("is_causal", is_causal, len(space), bool)
    for axis, length, k, s, d in zip(names, space, kernel, strides, dilations, strict=True):
        if k < 2:
            raise ValueError(f"kernel_size along {axis} must be >= 2, got {k}")
        if d < 1:
            raise ValueError(f"dilation along {axis} must be >= 1, got {d}")
        if not 1 <= s <= k:
            raise ValueError(f"stride along {axis} must be from 1 to kernel_size={k}, got {s}")
        if k * d > length:
            most = f"a dilation of at most {length // k}" if length >= k else f"a kernel_size of at most {length}"
            raise ValueError(
                f"kernel_size {k} * dilation {d} = {k * d} exceeds the {length} tokens along {axis}; use {most} or pad "
                "the grid"
            )
    return list(space), kernel, strides, dilations, causal


def _per_axis(name: str, value: Sizes | Flags, rank: int, kind: type) -> list:
    """One entry an axis; raises ValueError unless entries are of `kind` and as many as axes."""
    entries = list(value) if isinstance(value, Sequence) else [value] * rank
    if len(entries) != rank:
        raise ValueError(
            f"{name} must be one value or one for each of the {rank} axes of the grid, got {tuple(entries)}"
        )
    for entry in entries:
        if isinstance(entry, bool) != (kind is bool) or not isinstance(entry, kind | torch.SymInt):
            raise ValueError(f"{name} must hold {'booleans' if kind is bool else 'integers'}, got {value!r}")
    return entries


def check_rpb(rpb: Tensor | None, heads: int, geometry: Geometry) -> None:
    """Raise ValueError unless a table of relative positions fits (and windows are of the kind that have one).

    It is `[heads, 2 K - 1, ...]`, one entry an axis.
    """
    if rpb is None:
        return
    space, kernel, stride, _, causal = geometry
    for axis, k, s, c in zip(_AXES[len(space)], kernel, stride, causal, strict=True):
        problem = f"kernel_size {k} is even" if k % 2 == 0 else f"stride is {s}" if s != 1 else "it is causal"
        if k % 2 == 0 or s != 1 or c:
            raise ValueError(
                f"rpb needs odd kernel_size, stride 1 and no causal axis, but along {axis} {problem}; drop rpb or "
                "change the window"
            )
    wanted = (heads, *(2 * k - 1 for k in kernel))
    if tuple(rpb.shape) != wanted or not rpb.is_floating_point():
        raise ValueError(
            f"rpb must be floating-point {list(wanted)} (heads, 2 * kernel_size - 1 along each axis), got {rpb.dtype} "
            f"{list(rpb.shape)}"
        )


def check_grid(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The grid of heads-last tensors; raises ValueError unless the three fit together.

    They are `[B, *space, heads, D]`.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not 4 <= tensor.dim() <= 6:
            raise ValueError(
                f"{name} must be [batch, *space, heads, head_dim] with one to three axes in space, got shape "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != query.dtype:
            raise ValueError(f"query, key and value must have one floating-point dtype, got {name} {tensor.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must agree in all but head_dim, got {tuple(key.shape)}, {tuple(value.shape)}")
    if query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in batch, space and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"the number of query heads ({query.shape[-2]}) must be a multiple of the number of KV heads "
            f"({key.shape[-2]})"
        )
    return tuple(query.shape[1:-2])


def check_heads_first(first: str, one: Tensor, second: str, other: Tensor) -> tuple[int, ...]:
    """The grid of two tensors `[B, heads, *space, channels]`; raises ValueError unless both are such, in one dtype."""
    for name, tensor in ((first, one), (second, other)):
        if not 4 <= tensor.dim() <= 6:
            raise ValueError(
                f"{name} must be [batch, heads, *space, channels] with one to three axes in space, got shape "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != one.dtype:
            raise ValueError(f"{first} and {second} must have one floating-point dtype, got {one.dtype}, {other.dtype}")
    return tuple(other.shape[2:-1])


def with_extra(
    key: Tensor,
    value: Tensor,
    more_keys: Tensor | None,
    more_values: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    space: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[B, N + M, Hkv, ...]` and a mask `[B, N + M]`.

    Raises ValueError for additional keys, values and masks that do not fit.
    """
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_keys and additional_values must be given together, got one of them")
    batch, heads = key.shape[0], key.shape[-2]
    mask, more_mask = masks
    if mask is not None:
        if tuple(mask.shape) != (batch, *space) or mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool {[batch, *space]}, got {mask.dtype} {list(mask.shape)}")
        mask = mask.flatten(1)
    key, value = key.flatten(1, -3), value.flatten(1, -3)
    if more_keys is None or more_values is None:
        if more_mask is not None:
            raise ValueError("additional_key_mask needs additional_keys, got none")
        return key, value, mask
    count = more_keys.shape[1] if more_keys.dim() == 4 else -1
    for name, more, own in (("additional_keys", more_keys, key), ("additional_values", more_values, value)):
        wanted = (batch, count, heads, own.shape[-1])
        if tuple(more.shape) != wanted or more.dtype != own.dtype:
            raise ValueError(
                f"{name} must be [{batch}, tokens, {heads}, {own.shape[-1]}] in {own.dtype} and as many as "
                f"additional_keys, got {list(more.shape)} {more.dtype}"
            )
    if more_mask is not None and (tuple(more_mask.shape) != (batch, count) or more_mask.dtype != torch.bool):
        raise ValueError(
            f"additional_key_mask must be bool {[batch, count]}, got {more_mask.dtype} {list(more_mask.shape)}"
        )
    if mask is not None or more_mask is not None:
        shown = key.new_ones(batch, max(math.prod(space), count), dtype=torch.bool)
        mask = shown[:, : math.prod(space)] if mask is None else mask
        mask = torch.cat([mask, shown[:, :count] if more_mask is None else more_mask], 1)
    return torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1), mask
