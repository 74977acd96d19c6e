"""A cache of chosen tokens (`hf_attn.caches.selected`) as transformers' cache classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from hf_attn.caches.selected import SelectedTokens


class SelectedLayer(CacheLayerMixin):
    """One layer's chosen keys and values; its attention module appends and reads through `store`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.store = SelectedTokens()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first step brings the sizes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never right: the layer does not choose tokens."""
        raise ValueError("this cache keeps chosen tokens only; it belongs to a model converted with 'uoe'")

    def get_seq_length(self) -> int:
        return self.store.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.slots + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, -1 while empty."""
        return -1 if self.store.batch is None else self.store.batch

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number), or, as older versions ask, all beyond a positive number."""
        self.store.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(self.store.slots - tokens_to_remove, 0))

    def reset(self) -> None:
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.batch is not None:
            self.store.select_rows(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select_rows(indices)

    def offload(self) -> None:
        """Not offered: lists are read whole at every step."""

    def prefetch(self) -> None:
        """See `offload`."""


class UoeCache(Cache):
    """A cache for models converted with "uoe" that keeps, per KV head, only the tokens its expert chose.

    Args:
        config: the model's config; its dense layers keep all keys and values.
    """

    def __init__(self, config: Any) -> None:
        layers = range(config.num_hidden_layers)
        chosen = layers if config.uoe_layers is None else config.uoe_layers
        if config.uoe_attn_top_k is None:
            chosen = ()
        super().__init__(layers=[SelectedLayer() if index in chosen else DynamicLayer() for index in layers])

    @property
    def is_initialized(self) -> bool:
        return True
