"""The last raw keys of every layer, kept inside a model's own cache: what a key convolution needs to go on decoding.

It works in every kind of cache: dynamic, static, sliding, quantized, given by the user or made by `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_attn.integrations.transformers.extra_entry import ExtraEntry, extra_entry

# Rows kept beyond the W - 1 that the next token needs, so that a cache can be cropped by as many tokens.
SPARE_ROWS = 32


class KeyHistory(ExtraEntry):
    """Raw keys of the latest tokens, `[B, Hkv, S, D]` a layer, S = width - 1 + SPARE_ROWS, the latest last.

    Args:
        width: taps of the convolution.
        static: write in place, into tensors that keep their address (compiled decoding behind a static cache).
        host: see `ExtraEntry`.
    """

    is_croppable = True

    def __init__(self, width: int, static: bool, host: Any) -> None:
        super().__init__(host)
        self.needed = width - 1
        self.is_compileable = static
        self.record_past = False
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


def key_history(cache: Cache, layers: int, width: int, layer: int) -> KeyHistory:
    """The history inside a cache of a model with that many layers, for use by one of them; it is added when missing.

    Raises ValueError as `extra_entry`.
    """
    return extra_entry(
        cache,
        layers,
        lambda entries: 0 if torch.compiler.is_compiling() else int(entries[layer].get_seq_length()),
        lambda host: KeyHistory(width, bool(host.is_compileable), host),
        lambda found: isinstance(found, KeyHistory) and found.needed == width - 1,
        state="the keys a convolution needs to go on",
        model=f"a key convolution of kconv_width {width}",
    )
