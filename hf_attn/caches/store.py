"""What the storage of one layer offers to an integration: the same verbs for pages, block sums and recurrent states."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
        """Append, and give everything in the host's slots `[B, H, slots, D]`; raises ValueError when tokens are gone."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """Forget the last `count` slots."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; a row may repeat."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move everything."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes held, by part."""
