"""The states of Titans as transformers' cache classes."""

from __future__ import annotations

from transformers.cache_utils import Cache

from hf_attn.caches.memory import MemoryState
from hf_attn.integrations.transformers.own_layer import OwnLayer
from hf_attn.integrations.transformers.recurrent import RecurrentCache, RecurrentLayer


class MemoryLayer(RecurrentLayer):
    """One layer's memory. The model reads and writes `layer.state`."""

    refusal = "this layer of the cache holds a memory, not keys and values: it is a Titans model's"

    def __init__(self) -> None:
        self.state = MemoryState()
        OwnLayer.__init__(self, self.state)


class TitansCache(RecurrentCache):
    """A cache of Titans: fixed in size, however long the sequence. It can be saved and loaded, and cannot be cropped.

    Args:
        num_layers: layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        Cache.__init__(self, layers=[MemoryLayer() for _ in range(num_layers)])

    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.state.bytes() for layer in self.layers)
