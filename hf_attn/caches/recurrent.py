"""What a recurrent layer keeps instead of keys and values: named states of constant size, and a count of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.caches.store import outliving

_EXACT = (torch.float32, torch.float64)


class RecurrentState:
    """States of one layer, `[B, ...]` each, in fp32 or fp64.

    `slots` counts the tokens read, padding included, as the host counts them. There is no way back: a state is a sum.
    """

    def __init__(self) -> None:
        self.slots = 0
        self._states: dict[str, Tensor] = {}

    @property
    def batch(self) -> int | None:
        """Rows held; None while nothing is."""
        return next((state.shape[0] for state in self._states.values()), None)

    def get(self, name: str) -> Tensor | None:
        """The state called `name`, or None before the first `put`.

        States have the batch first, `[B, ...]`.
        """
        return self._states.get(name)

    @outliving
    def put(self, tokens: int, **states: Tensor) -> None:
        """Replace states after a step over `tokens` tokens.

        Raises ValueError for half-precision states (they drift: a 4096-token state in bf16 is off by up to 45 %), and
        for another batch or shape than is held; nothing is changed then.

        States have the batch first, `[B, ...]`.
        """
        for name, state in states.items():
            if state.dtype not in _EXACT:
                raise ValueError(f"state {name!r} must be float32 or float64, got {state.dtype}: sums in it drift")
            held = self._states.get(name)
            if held is not None and held.shape != state.shape:
                raise ValueError(
                    f"state {name!r} holds {tuple(held.shape)}, got {tuple(state.shape)}: this cache belongs to "
                    "another batch or model; start with a new one"
                )
        self._states.update({name: state.detach() for name, state in states.items()})
        self.slots += tokens

    def check(self, batch: int, **shapes: tuple[int, ...]) -> None:
        """Raise ValueError unless what is held fits a step of `batch` rows with states `[batch, *shape]`."""
        for name, shape in shapes.items():
            held = self._states.get(name)
            if held is not None and held.shape != (batch, *shape):
                raise ValueError(
                    f"the cache holds {name} {tuple(held.shape)}, but this step needs {(batch, *shape)}: it was filled "
                    "with another batch or by another model; start with a new one"
                )

    @outliving
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; a row may repeat.

        rows: int64 `[rows]`.
        """
        self._states = {name: state[rows.to(state.device)] for name, state in self._states.items()}

    def crop(self, count: int) -> None:
        """Forget the last tokens: possible only when there are none to forget.

        Raises ValueError otherwise.
        """
        if count:
            raise ValueError(
                f"a recurrent state cannot forget its last {count} tokens; run the sequence again without them "
                "(assisted decoding and prompt lookup need a cache that can)"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.slots = 0
        self._states = {}

    @outliving
    def to(self, device: torch.device | str) -> None:
        """Move everything."""
        self._states = {name: state.to(device) for name, state in self._states.items()}

    def bytes(self) -> int:
        """Bytes held."""
        return sum(state.numel() * state.element_size() for state in self._states.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save (safetensors): the states, and `slots` int64 `[1]`."""
        return {**self._states, "slots": torch.tensor([self.slots])}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state_dict`.

        States have the batch first, `[B, ...]`.
        """
        self._states = {name: tensor.clone() for name, tensor in tensors.items() if name != "slots"}
        self.slots = int(tensors["slots"])
