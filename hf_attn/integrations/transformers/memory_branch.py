"""Memories beside the keys and values of a pretrained model, inside its own cache of whatever kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_attn.caches.memory import MemoryState
from hf_attn.integrations.transformers.extra_entry import ExtraEntry, extra_entry


class MemoryEntry(ExtraEntry):
    """The memories of all layers of one cache; `host` is a layer of the model in it and answers for sizes."""

    is_croppable = False
    is_compileable = False

    def __init__(self, host: Any) -> None:
        super().__init__(host)
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


def memory_entry(cache: Cache, layers: int) -> MemoryEntry:
    """The memories inside a cache of a model with that many layers; they are added when missing.

    To be called before a step. Raises ValueError as `extra_entry`.
    """
    return extra_entry(
        cache,
        layers,
        lambda entries: int(entries[0].get_seq_length()),
        MemoryEntry,
        lambda found: isinstance(found, MemoryEntry),
        state="what memories read",
        model="a model with memories",
    )
