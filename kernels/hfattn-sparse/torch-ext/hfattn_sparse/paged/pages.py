"""Keys or values in pages, as they are stored: floating, or codes with scales and zero points."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .quantization import dequantize, unpack_int4


class Pages(NamedTuple):
    """Storage of one of keys and values.

    data: `[B, H, n, P, D]` floating; uint8 codes of the same shape, or packed `[B, H, n, P, D / 2]` with `bits` 4; int8
        codes with a scale alone.
    scale: `[B, H, n, P]`, or one value `[]`; None for floating data.
    zero: `[B, H, n, P]`; None for floating data and symmetric codes.
    bits: 8 or 4; None for floating data.
    """

    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    bits: int | None = None

    @property
    def head_dim(self) -> int:
        return self.data.shape[4] * (2 if self.bits == 4 else 1)

    @property
    def page_size(self) -> int:
        return self.data.shape[3]

    def dense(self) -> Tensor:
        """Everything as fp32 (floating data as it is), `[B, H, n, P, D]`."""
        if self.bits is None:
            return self.data
        codes = unpack_int4(self.data) if self.bits == 4 else self.data
        return dequantize(codes, self.scale, self.zero)

    def bytes(self) -> dict[str, int]:
        """Bytes of data, scales and zero points."""
        parts = {"data": self.data, "scales": self.scale, "zeros": self.zero}
        return {name: 0 if t is None else t.numel() * t.element_size() for name, t in parts.items()}

    def map(self, function) -> Pages:
        """The same pages with `function` applied to every tensor that has pages."""
        scale = self.scale if self.scale is None or self.scale.dim() == 0 else function(self.scale)
        return Pages(function(self.data), scale, None if self.zero is None else function(self.zero), self.bits)
