"""Scratch tensors that are used again and again within one call."""

from __future__ import annotations

import math
import threading

import torch

# Buffers up to this many bytes may outlive a call, see `Workspace(keep=True)`.
KEPT_BYTES = 1 << 20
_of_thread = threading.local()
_Buffers = dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]]


class Workspace:
    """Named scratch memory of one call: `take` hands out the same storage for the same name every time.

    Fresh megabyte-sized CPU tensors come as unmapped pages, and touching these for the first time costs several times
    what the arithmetic on them does; a loop over chunks therefore writes into the same few buffers.

    Args:
        device: of the buffers.
        keep: on a CPU, hand small buffers on to the thread's next call with this option, so that they are mapped once;
            at most `KEPT_BYTES` a name stay behind. No two such calls may be at work at once on a thread, and nothing
            taken may be returned to a caller.
    """

    def __init__(self, device: torch.device, *, keep: bool = False) -> None:
        self._device = device
        self._buffers: _Buffers = {}
        self._kept = _of_thread.__dict__.setdefault("buffers", {}) if keep and device.type == "cpu" else None

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; what an earlier `take` of this name returned becomes invalid."""
        buffers = self._buffers
        size = math.prod(shape)
        if self._kept is not None and size * dtype.itemsize <= KEPT_BYTES:
            buffers = self._kept
        # The latest view is kept too: making one costs as much as a small product.
        buffer, view = buffers.get((name, dtype), (None, None))
        if view is not None and view.shape == shape:
            return view
        # Inference tensors must not be written by later calls outside inference mode.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=self._device)
            view = buffer[:size].view(shape)
        buffers[name, dtype] = buffer, view
        return view
