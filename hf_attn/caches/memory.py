"""What a Titans layer keeps: the weights and momentum of its memory in fp32, ends of streams, and a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn.caches.recurrent import RecurrentState
from hf_attn.caches.store import outliving

# The memory itself: sums over the whole sequence, which drift in half precision.
_SUMS = ("weights.", "momentum.", "chunk_start_weights.", "before.")


class MemoryState(RecurrentState):
    """Named tensors `[B, ...]` of one layer, and counts: one int while all rows have the same, int64 `[B]` otherwise.

    Sums are fp32 or fp64; ends of streams and windows have the model's dtype, and may grow until they are full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def carried(self) -> dict[str, Any]:
        """All of it, as the mixers take it; empty at the beginning."""
        return {**self._states, **self.counts}

    @outliving
    def keep(self, tokens: int, carried: dict[str, Any]) -> None:
        """Replace everything after a step over `tokens` tokens.

        Raises ValueError for half-precision sums, and for sums of another batch or shape than are held; nothing is
        changed then.
        """
        states = {name: t for name, t in carried.items() if isinstance(t, Tensor)}
        super().put(tokens, **{name: t for name, t in states.items() if name.startswith(_SUMS)})
        self._states = {name: t.detach() for name, t in states.items()}
        self.counts = {name: n for name, n in carried.items() if isinstance(n, int)}

    def reset(self) -> None:
        """Forget states and counts."""
        super().reset()
        self.counts = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save (safetensors), none sharing memory with another; counts are int64 scalars."""
        tensors = {name: t.clone() for name, t in super().state_dict().items()}
        return tensors | {name: torch.tensor(n) for name, n in self.counts.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state_dict`; ValueError for sums in half precision.

        States have the batch first, `[B, ...]`.
        """
        for name, tensor in tensors.items():
            if name.startswith(_SUMS) and tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"state {name!r} must be float32 or float64, got {tensor.dtype}: sums in it drift")
        super().load_state_dict({name: t for name, t in tensors.items() if t.dim()})
        self.counts = {name: int(t) for name, t in tensors.items() if not t.dim()}
