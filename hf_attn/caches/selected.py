"""Keys and values of chosen tokens only: every head of a row keeps a list of its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.caches.store import outliving

_GROWTH = 64


class SelectedTokens:
    """One layer's store: per row and KV head the chosen tokens, in order, with their slots in the sequence.

    `slots` counts the tokens seen, chosen or not, as the host counts them.
    """

    def __init__(self) -> None:
        self.slots = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.places: Tensor | None = None
        self.lengths: Tensor | None = None

    @property
    def batch(self) -> int | None:
        """Rows held; None while empty."""
        return None if self.key is None else self.key.shape[0]

    @property
    def _lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and places, once there is room for some."""
        assert self.key is not None and self.value is not None and self.places is not None
        return self.key, self.value, self.places

    @outliving
    def append(self, key: Tensor, value: Tensor, selected: Tensor) -> None:
        """Add the chosen ones of new tokens.

        Args:
            key, value: `[B, H, n, D]`, `[B, H, n, Dv]`.
            selected: bool `[B, H, n]`.

        Raises ValueError for other rows, heads or sizes than held; nothing is changed then.
        """
        if (self.key is not None and self.value is not None) and (
            self.key.shape[:2] + self.key.shape[3:] != key.shape[:2] + key.shape[3:]
            or self.value.shape[3] != value.shape[3]
        ):
            raise ValueError(
                f"the cache holds keys of shape {tuple(self.key.shape)}, got {tuple(key.shape)}: it was filled with "
                "another batch or by another model; start with a new one"
            )
        rank = selected.long().cumsum(-1)
        held = torch.zeros_like(rank[..., 0]) if self.lengths is None else self.lengths
        self._reserve(key, value, int((held + rank[..., -1]).max()) if rank.numel() else 0)
        # Tokens that were not chosen go to the last slot, which is never read.
        keys, values, held_places = self._lists
        spare = keys.shape[2] - 1
        target = torch.where(selected, held[..., None] + rank - 1, spare)
        for store, new in ((keys, key), (values, value)):
            store.scatter_(2, target[..., None].expand(*target.shape, new.shape[3]), new)
        places = torch.arange(self.slots, self.slots + key.shape[2], device=key.device).expand_as(target)
        held_places.scatter_(2, target, places)
        self.lengths = held + rank[..., -1] if rank.shape[-1] else held
        self.slots += key.shape[2]

    def read(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[B, H, L, D]`, values `[B, H, L, Dv]`, and what each of the last `queries` tokens sees, bool
        `[B, H, queries, L]`; L is the longest list."""
        keys, values, places = self._lists
        assert self.lengths is not None
        longest = max(int(self.lengths.max()), 1)
        within = torch.arange(longest, device=keys.device) < self.lengths[..., None]
        last = torch.arange(self.slots - queries, self.slots, device=keys.device)
        seen = within[:, :, None] & (places[:, :, None, :longest] <= last[:, None])
        return keys[:, :, :longest], values[:, :, :longest], seen

    def _reserve(self, key: Tensor, value: Tensor, longest: int) -> None:
        capacity = 0 if self.key is None else self.key.shape[2]
        if longest < capacity:
            return
        wanted = longest + _GROWTH
        for name, like in (("key", key), ("value", value)):
            held = getattr(self, name)
            grown = like.new_zeros(*like.shape[:2], wanted, like.shape[3])
            if held is not None:
                grown[:, :, :capacity] = held
            setattr(self, name, grown)
        places = torch.zeros(*key.shape[:2], wanted, dtype=torch.int64, device=key.device)
        if self.places is not None:
            places[:, :, :capacity] = self.places
        self.places = places

    @outliving
    def crop(self, count: int) -> None:
        """Forget the last `count` tokens; ValueError for more than there are."""
        if not 0 <= count <= self.slots:
            raise ValueError(f"cannot forget {count} of {self.slots} tokens")
        self.slots -= count
        if self.lengths is not None:
            places = self._lists[2]
            slots = torch.arange(places.shape[2], device=places.device)
            self.lengths = ((slots < self.lengths[..., None]) & (places < self.slots)).sum(-1)

    @outliving
    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order; a row may repeat.

        rows: int64 `[rows]`.
        """
        for name in ("key", "value", "places", "lengths"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])

    def reset(self) -> None:
        """Forget everything."""
        self.slots = 0
        self.key = self.value = self.places = self.lengths = None

    def entries(self) -> int:
        """Chosen tokens held, over rows and heads."""
        return 0 if self.lengths is None else int(self.lengths.sum())
