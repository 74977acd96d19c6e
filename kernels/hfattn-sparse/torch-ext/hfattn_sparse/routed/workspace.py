"""Scratch tensors that are used again and again within one call."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named scratch memory of one call: `take` hands out the same storage for the same name every time.

    Fresh megabyte-sized CPU tensors come as unmapped pages, and touching these for the first time costs several times
    what the arithmetic on them does; a loop over chunks therefore writes into the same few buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; what an earlier `take` of this name returned becomes invalid."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            self._buffers[name, dtype] = buffer = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)
