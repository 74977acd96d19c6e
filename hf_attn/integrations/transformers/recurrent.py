"""Recurrent states as transformers' cache classes: `generate` with beams, batches and chunks works on them."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hf_attn.caches.recurrent import RecurrentState
from hf_attn.integrations.transformers.own_layer import OwnLayer


class RecurrentLayer(OwnLayer):
    """One layer's states. The model reads and writes `layer.state`."""

    is_croppable = False
    refusal = "this layer of the cache holds a recurrent state, not keys and values: it is another model's"

    def __init__(self) -> None:
        self.state = RecurrentState()
        super().__init__(self.state)


class RecurrentCache(Cache):
    """A cache whose layers hold recurrent states, and keys and values in the layers of `attention`.

    Args:
        num_layers: layers of the model.
        attention: indices of layers that keep keys and values (hybrid models).
    """

    def __init__(self, num_layers: int, attention: tuple[int, ...] = ()) -> None:
        layers = [DynamicLayer() if index in attention else RecurrentLayer() for index in range(num_layers)]
        super().__init__(layers=layers)

    @property
    def is_initialized(self) -> bool:
        return True

    def save(self, path: str | os.PathLike) -> None:
        """Write all states to one safetensors file; only caches without keys and values."""
        from safetensors.torch import save_file

        tensors = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RecurrentLayer):
                raise ValueError(f"layer {index} holds keys and values; only recurrent states can be saved")
            tensors.update({f"{index}.{name}": t.contiguous() for name, t in layer.state.state_dict().items()})
        save_file(tensors, os.fspath(path))

    def load(self, path: str | os.PathLike) -> RecurrentCache:
        """Read what `save` wrote into this cache and return it; ValueError for the states of another model."""
        from safetensors.torch import load_file

        by_layer: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(os.fspath(path)).items():
            number, _, state = name.partition(".")
            by_layer.setdefault(int(number), {})[state] = tensor
        if set(by_layer) != set(range(len(self.layers))):
            raise ValueError(f"{path} holds states of {len(by_layer)} layers, this cache has {len(self.layers)}")
        for index, tensors in by_layer.items():
            self.layers[index].state.load_state_dict(tensors)
        return self


def real_tokens(attention_mask: Tensor | None, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of the new tokens are real, bool `[B, length]` or None for all, and their position among the real ones.

    Args:
        attention_mask: `[B, past + length]`, or `[B, length]` for the new tokens alone; 1 = real. Raises ValueError for
            a mask of pairs: recurrent models have no pairs.
        past: tokens read before.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] (1 = real), got {tuple(attention_mask.shape)}: linear attention "
            "is causal and has no mask of pairs; packed sequences are given by position_ids or cu_seq_lens_q"
        )
    if attention_mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but the cache holds {past} and {length} are new"
        )
    mask = attention_mask.bool()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    if attention_mask.shape[1] == length and past:
        positions = positions + past
    return mask[:, -length:], positions


def packed_borders(position_ids: Tensor | None, length: int) -> Tensor | None:
    """cu_seqlens int64 of a single row whose position_ids restart at 0, else None."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    if starts.numel() < 2:
        return None
    if int(starts[0]) != 0:
        raise ValueError("position_ids of packed sequences must begin with 0")
    return torch.cat([starts, starts.new_tensor([length])])
