"""What cache layers share whose model reads and writes the storage itself, instead of handing keys and values over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class OwnLayer(CacheLayerMixin):
    """One layer around `kept`, which counts its tokens in `slots` and its rows in `batch`, and can `crop(count)`,
    `select_rows(rows)` and `reset()`."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False
    # What `update` says: it is never right here.
    refusal = "this layer of the cache is filled by its model, not by keys and values: it is another model's"

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first step brings the sizes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises ValueError: an attention layer of another model got this cache."""
        raise ValueError(self.refusal)

    def get_seq_length(self) -> int:
        """As the host's."""
        return self.kept.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the host's."""
        return self.kept.slots + int(query_length), 0

    def get_max_length(self) -> int:
        """As the host's."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, -1 while empty."""
        return -1 if self.kept.batch is None else self.kept.batch

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number), or, as older versions ask, all beyond a positive number."""
        tokens_to_remove = int(tokens_to_remove)
        self.kept.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(self.kept.slots - tokens_to_remove, 0))

    def reset(self) -> None:
        """As the host's."""
        self.kept.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As the host's."""
        self.kept.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the host's."""
        if self.kept.batch is not None:
            self.kept.select_rows(torch.arange(self.kept.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the host's: row numbers, or a bool for each row."""
        if self.kept.batch is not None:
            self.kept.select_rows(torch.arange(self.kept.batch)[indices.cpu()])

    def offload(self) -> None:
        """What is kept stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""
