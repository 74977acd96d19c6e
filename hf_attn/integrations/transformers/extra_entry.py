"""One more entry behind the layers of a model's own cache: how state of ours lives in every kind of host cache.

A cache of transformers is a list of layers, and whatever happens to it (beams, crops, repeats, resets) happens to each
of them; so state that is an entry follows, in caches given by the user or made by `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers.cache_utils import Cache

Entry = TypeVar("Entry", bound="ExtraEntry")


class ExtraEntry:
    """Base of such state; subclasses add `crop`, `reset` and the three choices of rows.

    Args:
        host: a layer of the model in the same cache; answers for sizes, of which this entry has none.
    """

    is_sliding = False
    is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, host: Any) -> None:
        self._host = host

    def offload(self) -> None:
        """Stays where it is: it is small and needed at every step."""

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


def extra_entry(
    cache: Cache,
    layers: int,
    held: Callable[[list[Any]], int],
    make: Callable[[Any], Entry],
    fits: Callable[[Any], bool],
    *,
    state: str,
    model: str,
) -> Entry:
    """The entry behind the `layers` layers of a cache; it is made when missing.

    Args:
        held: `(layers of the cache) -> tokens` that were read before there was an entry.
        make: `(first layer) -> entry`.
        fits: is a found entry ours?
        state: what it keeps, for errors: "the keys a convolution needs".
        model: this model, for errors.

    Raises ValueError for objects that are no list of layers (continuous batching's paged cache, for one), for a cache
    that holds tokens from before it had the entry, and for another model's.
    """
    entries = getattr(cache, "layers", None)
    if not isinstance(entries, list):
        raise ValueError(
            f"{model} keeps {state} in a transformers Cache, got {type(cache).__name__}; continuous batching "
            "(generate_batch) is not supported, use generate"
        )
    while len(entries) < layers:
        # A DynamicCache without a config grows with the layers that call it; the entry has to come after them.
        entries.append(cache.layer_class_to_replicate())
    if len(entries) == layers:
        count = held(entries)
        if count > 0:
            raise ValueError(
                f"the cache holds {count} tokens, but not {state}: another model filled it, or it was copied without "
                "its last entry; start a new cache"
            )
        entries.append(make(entries[0]))
    found = entries[layers]
    if not fits(found):
        raise ValueError(
            f"the cache belongs to another model: its entry {layers} of {len(entries)} is a {type(found).__name__} "
            f"that does not fit {model}; start a new cache"
        )
    return found
