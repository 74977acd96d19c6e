"""Formats of stored keys and values, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn.ops.hfattn_sparse.paged.pages import Pages
from hf_attn.ops.hfattn_sparse.paged.quantization import pack_int4, quantize_per_tensor, quantize_per_token

FORMATS = ("int8", "int4", "int8-per-tensor")


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    Args:
        name: None (as they come), "int8" or "int4" (asymmetric, a scale and a zero point for every token and head), or
            "int8-per-tensor" (symmetric, one scale for the keys and one for the values of a layer).
        zero_dtype: "float16" or "float32", of the zero points.
    """

    name: str | None = None
    zero_dtype: str = "float16"

    @property
    def bits(self) -> int | None:
        return {None: None, "int4": 4}.get(self.name, 8)

    def encode(self, x: Tensor, scale: Tensor | None = None) -> Pages:
        """Tokens `[B, H, n, D]` as one page `[B, H, 1, n, D]`; `scale` is the layer's for "int8-per-tensor"."""
        x = x.detach()[:, :, None]
        if self.name is None:
            return Pages(x)
        if self.name == "int8-per-tensor":
            return Pages(quantize_per_tensor(x, scale), scale, None, 8)
        codes, scales, zeros = quantize_per_token(x, self.bits, getattr(torch, self.zero_dtype))
        return Pages(pack_int4(codes) if self.bits == 4 else codes, scales, zeros, self.bits)

    def allocate(self, shape: tuple[int, int, int, int, int], like: Tensor, scale: Tensor | None = None) -> Pages:
        """Zeroed storage of `shape` = (B, H, pages, P, D) in this format, on the device of `like`.

        scale: fp32 `[]` of "int8-per-tensor", None in other formats.
        """
        batch, heads, pages, size, dim = shape
        device = like.device
        if self.name is None:
            return Pages(torch.zeros(shape, dtype=like.dtype, device=device))
        if self.name == "int8-per-tensor":
            return Pages(torch.zeros(shape, dtype=torch.int8, device=device), scale, None, 8)
        stored = (batch, heads, pages, size, dim // 2 if self.bits == 4 else dim)
        zero = torch.zeros(stored[:4], dtype=getattr(torch, self.zero_dtype), device=device)
        return Pages(
            torch.zeros(stored, dtype=torch.uint8, device=device),
            torch.zeros(stored[:4], dtype=torch.float16, device=device),
            zero,
            self.bits,
        )

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        """Bytes of one token of one head for one of keys and values."""
        if self.name is None:
            return dim * dtype.itemsize
        if self.name == "int8-per-tensor":
            return dim
        return (dim / 2 if self.bits == 4 else dim) + 2 + getattr(torch, self.zero_dtype).itemsize


def absmax_scale(x: Tensor) -> Tensor:
    """The scale of "int8-per-tensor" under which the largest |x| becomes 127, fp32 `[]`; 1 for an empty or zero x."""
    largest = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return torch.where(largest > 0, largest / 127, 1.0)
