"""Memories beside the keys and values of a pretrained model: one more entry behind the layers of its own cache.

Whatever happens to a cache (beams, repeats, resets) happens to each entry, so the memories follow in every kind
of cache that is a list of layers, given by the user or made by `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_attn.caches.memory import MemoryState


class MemoryEntry:
    """The memories of all layers of one cache; `host` is a layer of the model in it and answers for sizes."""

    is_sliding = False
    is_croppable = False
    is_compileable = False
    is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, host: Any) -> None:
        self._host = host
        self._states: dict[int, MemoryState] = {}

    def state(self, layer: int) -> MemoryState:
        """What one layer keeps."""
        return self._states.setdefault(layer, MemoryState())

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless there is nothing to forget."""
        for state in self._states.values():
            state.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(state.slots - tokens_to_remove, 0))

    def reset(self) -> None:
        """As the host's."""
        self._states.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As the host's."""
        for state in self._states.values():
            state.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the host's."""
        for state in self._states.values():
            if state.batch is not None:
                state.select_rows(torch.arange(state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the host's."""
        for state in self._states.values():
            state.select_rows(indices)

    def offload(self) -> None:
        """Stays where it is: every step needs it."""

    prefetch = offload

    def get_seq_length(self) -> Any:
        """As the host's."""
        return self._host.get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, Any]:
        """As the host's."""
        return self._host.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """As the host's."""
        return self._host.get_max_length()


def memory_entry(cache: Cache, layers: int) -> MemoryEntry:
    """The memories inside a cache of a model with that many layers; they are added when missing.

    To be called before a step. Raises ValueError for objects that are no list of layers, and for a cache that holds
    tokens from before it had memories.
    """
    entries = getattr(cache, "layers", None)
    if not isinstance(entries, list):
        raise ValueError(
            f"memories are kept in a transformers Cache, got {type(cache).__name__}; continuous batching "
            "(generate_batch) is not supported, use generate"
        )
    while len(entries) < layers:
        # A DynamicCache without a config grows with the layers that call it; the memories have to come after them.
        entries.append(cache.layer_class_to_replicate())
    if len(entries) == layers:
        held = int(entries[0].get_seq_length())
        if held > 0:
            raise ValueError(
                f"the cache holds {held} tokens that no memory has read: another model filled it, or it was copied "
                "without its last entry; start a new cache"
            )
        entries.append(MemoryEntry(entries[0]))
    if not isinstance(entries[layers], MemoryEntry):
        raise ValueError(
            f"the cache belongs to another model: its entry {layers} is a {type(entries[layers]).__name__}"
        )
    return entries[layers]
