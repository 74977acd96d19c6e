"""The cache of landmark models as a cache class of transformers."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.caches.landmark import LandmarkStore
from hf_attn.integrations.transformers.cache import StoreLayer


class LandmarkLayer(StoreLayer):
    """One layer. Its model reads the store itself, so nothing passes through `update`."""

    is_croppable = False

    def __init__(self, store: LandmarkStore) -> None:
        super().__init__(store, reads=lambda: False)


class LandmarkCache(Cache):
    """Blocks, their landmarks and the open block of every layer.

    `generate` makes one for every landmark model; make your own to keep it over several turns.

    Args:
        config: of a landmark model (`landmark_block_size`, `landmark_offload`, `landmark_max_blocks`).

    Lengths that the host asks for (`get_seq_length`) count the tokens it gave, padding included and landmarks not:
    it slices its own input by them. `lengths` counts what is stored.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        size, offload = config.landmark_block_size, config.landmark_offload
        self.block_size = size
        self.stores = [
            LandmarkStore(size, offload, config.landmark_max_blocks) for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=[LandmarkLayer(store) for store in self.stores])

    def lengths(self, batch: int) -> list[int]:
        """Tokens of every row, landmarks included; ValueError for another number of rows."""
        held = self.stores[0].batch
        if held is None:
            return [0] * batch
        if held != batch:
            raise ValueError(f"this cache holds {held} rows, the input has {batch}; use a cache for each batch")
        return self.stores[0].lengths

    def regular_lengths(self, batch: int) -> list[int]:
        """Tokens of every row without landmarks."""
        return [length - length // self.block_size for length in self.lengths(batch)]

    def commit(self, chunk: Any) -> None:
        """Every layer has run: store what they hold of `chunk`."""
        for store in self.stores:
            store.commit()

    def count_slots(self, count: int) -> None:
        """The host gave `count` more tokens a row."""
        for store in self.stores:
            store.slots += count

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def report(self) -> dict[str, Any]:
        """What is held, JSON-ready: bytes by part, bytes on the device without fetched blocks, blocks by row."""
        sizes = [store.bytes() for store in self.stores]
        return {
            "bytes": {name: sum(size[name] for size in sizes) for name in sizes[0]},
            # Layers run one after the other, so one fetch is alive at a time.
            "largest_fetch": max(size["fetched"] for size in sizes),
            "device": sum(store.device_bytes() for store in self.stores),
            "blocks": list(self.stores[0].blocks),
            "dropped_blocks": list(self.stores[0].dropped),
            "tokens": self.stores[0].lengths,
        }
