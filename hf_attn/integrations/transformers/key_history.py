"""The last raw keys of every layer, kept inside a model's own cache: what a key convolution needs to go on decoding.

A cache of transformers is a list of layers, and whatever happens to it (beams, crops, resets) happens to each of them.
So the history is one more entry behind the model's layers, and works in every kind of cache: dynamic, static, sliding,
quantized, given by the user or made by `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

# Rows kept beyond the W - 1 that the next token needs, so that a cache can be cropped by as many tokens.
SPARE_ROWS = 32


class KeyHistory:
    """Raw keys of the latest tokens, `[B, Hkv, S, D]` a layer, S = width - 1 + SPARE_ROWS, the latest last.

    Args:
        width: taps of the convolution.
        static: write in place, into tensors that keep their address (compiled decoding behind a static cache).
        host: a layer of the model in the same cache; answers for sizes, of which this entry has none.
    """

    is_sliding = False
    is_croppable = True
    is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, width: int, static: bool, host: Any) -> None:
        self.needed = width - 1
        self.is_compileable = static
        self.record_past = False
        self._host = host
        self._lost = False
        self._rows: dict[int, Tensor] = {}
        # Tokens seen, and how many of the kept rows are theirs; tensors when static, as a compiled step moves them on.
        self._seen: dict[int, Any] = {}
        self._valid: dict[int, Any] = {}

    def read(self, layer: int, key: Tensor) -> Tensor:
        """State to start from for new keys `[B, Hkv, N, D]` of a layer."""
        if self._lost:
            raise ValueError("this cache was cropped further back than a key convolution can follow; start a new one")
        if layer not in self._rows:
            rows = key.new_zeros(key.shape[0], key.shape[1], self.needed + SPARE_ROWS, key.shape[3])
            seen: int | Tensor = 0
            valid: int | Tensor = 0
            if self.is_compileable:
                seen, valid = (torch.zeros((), dtype=torch.long, device=key.device) for _ in range(2))
                if not torch.compiler.is_compiling():
                    for tensor in (rows, seen, valid):
                        torch._dynamo.mark_static_address(tensor)
            self._rows[layer], self._seen[layer], self._valid[layer] = rows, seen, valid
        rows = self._rows[layer]
        if self.record_past and not self.is_compileable:
            # Every token since the last crop may be taken back: keep them all until then.
            rows = torch.cat([rows.new_zeros(*rows.shape[:2], key.shape[2], rows.shape[3]), rows], 2)
        return rows

    def write(self, layer: int, rows: Tensor, new: int) -> None:
        """Keep the state after `new` more tokens, of the shape `read` gave."""
        if self.is_compileable:
            self._rows[layer].copy_(rows)
            self._seen[layer].add_(new)
            self._valid[layer].add_(new).clamp_(max=rows.shape[2])
            return
        # A copy: the rows are a view into all keys of this call, which would stay alive with it.
        self._rows[layer] = rows.clone()
        self._seen[layer] = self._seen[layer] + new
        self._valid[layer] = min(self._valid[layer] + new, rows.shape[2])

    # -- what a cache does to its entries ------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number). Raises ValueError when the keys before them are gone.

        The model's layers are cropped by then, so the cache is of no use any more, and says so.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        removed = abs(tokens_to_remove)
        for layer, rows in self._rows.items():
            seen, valid = int(self._seen[layer]), int(self._valid[layer])
            if valid - removed < min(self.needed, seen - removed) or removed > seen:
                self._lost = True
                raise ValueError(
                    f"crop(-{removed}) goes back further than the {SPARE_ROWS} tokens for which a key convolution "
                    "keeps its state; call cache.activate_past_recording() before the tokens to remove, or start anew"
                )
            kept = rows[:, :, : rows.shape[2] - removed]
            size = self.needed + SPARE_ROWS
            kept = kept[:, :, -size:] if kept.shape[2] >= size else kept
            fill = rows.new_zeros(*rows.shape[:2], size - kept.shape[2], rows.shape[3])
            kept = torch.cat([fill, kept], 2)
            if self.is_compileable:
                rows.copy_(kept)
                self._seen[layer].sub_(removed)
                self._valid[layer].sub_(removed)
            else:
                self._rows[layer] = kept
                self._seen[layer], self._valid[layer] = seen - removed, min(valid - removed, size)

    def activate_past_recording(self) -> None:
        """As the host's."""
        self.record_past = True

    def reset(self) -> None:
        """As the host's."""
        self._lost = False
        if self.is_compileable:
            for tensors in (self._rows, self._seen, self._valid):
                for tensor in tensors.values():
                    tensor.zero_()
        else:
            for kept in (self._rows, self._seen, self._valid):
                kept.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As the host's."""
        self._select(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the host's."""
        self._select(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the host's."""
        self._select(lambda rows: rows[indices])

    def _select(self, choose: Any) -> None:
        for layer, rows in self._rows.items():
            chosen = choose(rows)
            if self.is_compileable and chosen.shape == rows.shape:
                rows.copy_(chosen)
            else:
                self._rows[layer] = chosen

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


def key_history(cache: Cache, layers: int, width: int, layer: int) -> KeyHistory:
    """The history inside a cache of a model with that many layers, for use by one of them; it is added when missing.

    Raises ValueError for objects that are no list of layers (continuous batching's paged cache, for one), and for a
    cache that holds tokens from before it had a history.
    """
    entries = getattr(cache, "layers", None)
    if not isinstance(entries, list):
        raise ValueError(
            f"a key convolution keeps its state in a transformers Cache, got {type(cache).__name__}; continuous "
            "batching (generate_batch) is not supported, use generate"
        )
    while len(entries) < layers:
        # A DynamicCache without a config grows with the layers that call it; the history has to come after them.
        entries.append(cache.layer_class_to_replicate())
    if len(entries) == layers:
        held = 0 if torch.compiler.is_compiling() else int(entries[layer].get_seq_length())
        if held > 0:
            raise ValueError(
                f"the cache holds {held} tokens, but not the keys a convolution needs to go on: another model filled "
                "it, or it was copied without its last entry; start a new cache"
            )
        entries.append(KeyHistory(width, bool(entries[0].is_compileable), entries[0]))
    found = entries[layers]
    if not isinstance(found, KeyHistory) or found.needed != width - 1:
        raise ValueError(
            f"the cache belongs to another model: it has {len(entries)} layers, this one {layers} with kconv_width "
            f"{width}; start a new cache"
        )
    return found
