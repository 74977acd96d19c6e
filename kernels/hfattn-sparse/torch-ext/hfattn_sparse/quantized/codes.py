"""Symmetric codes: scale = amax / qmax with amax >= 1e-7, code = round(x / scale), halves to even (PAROAttention)."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-7


def qmax(bits: int) -> int:
    """The largest code: 127 of 8 bits, 7 of 4."""
    return 2 ** (bits - 1) - 1


def quantize_groups(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """One scale for `group` consecutive rows; the last group may be shorter.

    Args:
        x: `[B, H, N, D]`, any strides. A group with a NaN or an infinity gets a scale that is not finite.

    Returns codes int8 `[B, H, N, D]` (contiguous) and scales `[B, H, ceil(N / group)]` in fp32 (fp64 for fp64).
    """
    batch, heads, length, dim = x.shape
    groups = -(-length // group)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, groups, dtype=accumulator(x.dtype), device=x.device)
    whole = length // group * group
    for rows, size in ((slice(0, whole), group), (slice(whole, length), length - whole)):
        if rows.start == rows.stop:
            continue
        part = x[:, :, rows].to(scales.dtype).unflatten(2, (-1, size))
        amax = torch.linalg.vector_norm(part, float("inf"), dim=(3, 4))
        scale = amax.clamp(min=SMALLEST) / qmax(bits)
        scales[:, :, rows.start // group : -(-rows.stop // group)] = scale
        codes[:, :, rows] = (part / scale[..., None, None]).round_().flatten(2, 3)
    return codes, scales


def quantize_channels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One scale for each channel over all rows: codes int8 `[B, H, N, D]` and scales `[B, H, D]`."""
    wide = x.to(accumulator(x.dtype))
    amax = (
        torch.linalg.vector_norm(wide, float("inf"), dim=2) if x.shape[2] else wide.new_zeros(*x.shape[:2], x.shape[3])
    )
    scale = amax.clamp(min=SMALLEST) / qmax(bits)
    return (wide / scale[:, :, None]).round_().to(torch.int8), scale


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales, scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
