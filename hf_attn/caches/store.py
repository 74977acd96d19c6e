"""What the storage of one layer offers to an integration: the same verbs for pages, block sums and recurrent states."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


def outliving(method: Callable) -> Callable:
    """Let what a method stores outlive `torch.inference_mode`: its tensors could not be written to outside of it."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class LayerStore(ABC):
    """One attention layer's share of a cache. A mechanism finds it in `call.layer.cache` and appends to it itself.

    `slots` counts the tokens stored, padding included, as the host counts them; `batch` is None while it is empty.
    """

    slots: int = 0
    batch: int | None = None

    @abstractmethod
    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError when `[B, H, n, D]` and `[B, H, n, Dv]` do not continue what is stored; changes nothing."""

    @abstractmethod
    def dense(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and give everything in the host's slots `[B, H, slots, D]`; ValueError when tokens are gone."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """Forget the last `count` slots."""

    def take_back(self, count: int) -> None:
        """Undo the newest step, which brought `count` slots, as if it had never been made."""
        self.crop(count)

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; a row may repeat.

        rows: int64 `[rows]`.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move everything."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes held, by part."""
