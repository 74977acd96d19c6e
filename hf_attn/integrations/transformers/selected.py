"""A cache of chosen tokens (`hf_attn.caches.selected`) as transformers' cache classes."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer

from hf_attn.caches.selected import SelectedTokens
from hf_attn.integrations.transformers.own_layer import OwnLayer


class SelectedLayer(OwnLayer):
    """One layer's chosen keys and values; its attention module appends and reads through `store`."""

    is_croppable = True
    refusal = "this cache keeps chosen tokens only; it belongs to a model converted with 'uoe'"

    def __init__(self) -> None:
        self.store = SelectedTokens()
        super().__init__(self.store)


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
