"""Quantised keys and values: asymmetric per token and head (4 or 8 bits), or symmetric with one scale (8 bits)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

FP16_MAX = 65504.0


def quantize_per_token(x: Tensor, bits: int, zero_dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes with a scale and a (not integer) zero point for every vector (QServe, arXiv 2405.04532).

    scale = fp16((max - min) / Q), zero = fp16(-Q min / (max - min)), code = clamp(round(x / scale + zero), 0, Q) with
    Q = 2^bits - 1, halves rounded to even; arithmetic in fp32 with the rounded scale and zero point.

    Args:
        x: `[..., D]`, any floating dtype.
        bits: 4 or 8.
        zero_dtype: dtype of the zero points; float32 where vectors are far from zero and nearly constant.

    Returns codes uint8 `[..., D]` (not packed), scales fp16 `[...]` and zero points `[...]`. A constant vector is kept
    up to the rounding of its scale. A zero point beyond fp16 is clipped, with a warning.
    """
    levels = float(2**bits - 1)
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    span = high - low
    scale = (span / levels).clamp(max=FP16_MAX).to(torch.float16)
    constant = scale == 0
    magnitude = low.abs().clamp(max=FP16_MAX).to(torch.float16)
    scale = torch.where(constant, torch.where(magnitude == 0, 1.0, magnitude), scale)
    zero = torch.where(constant, torch.where(low < 0, levels, 0.0), (-levels * low) / torch.where(constant, 1.0, span))
    if zero_dtype == torch.float16:
        # Only where looking is free: on a GPU it would wait for the device in every step.
        if zero.device.type == "cpu" and bool((zero.abs() > FP16_MAX).any()):
            warnings.warn(
                "zero points beyond float16 were clipped: some keys or values are nearly constant and far from zero; "
                "use zero_dtype='float32'",
                stacklevel=2,
            )
        zero = zero.clamp(-FP16_MAX, FP16_MAX)
    zero = zero.to(zero_dtype)
    codes = (x * (1.0 / scale.float())[..., None] + zero.float()[..., None]).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def quantize_per_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric codes int8 of `x` with one scale: clamp(round(x / scale), -128, 127), halves rounded to even."""
    return (x.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, `[..., D]` -> `[..., D / 2]`: the even channel in the low half. D must be even."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`: uint8 `[..., D / 2]` -> `[..., D]`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """scale * (code - zero) in fp32; codes `[..., D]`, scale and zero `[...]`, or a scale alone `[]` (symmetric)."""
    if zero is None:
        return codes.float() * scale.float()
    return scale.float()[..., None] * (codes.float() - zero.float()[..., None])
