"""MiniMax's linear attention (transformers' `minimax`) through `linear_attention`: same weights, same function.

What the host's code does wrong, each shown by a test: beam search reorders keys and values but not the linear states;
states and decays are in the model's dtype, and sums in bf16 drift; several tokens behind a filled cache run in a loop
of single tokens; padding on the right decays the state; a first layer without keys hides the length of the cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention, MiniMaxModel

from hf_attn import ops
from hf_attn.integrations.transformers.recurrent import RecurrentLayer
from hf_attn.integrations.transformers.repairs import Undo, become, together
from hf_attn.nn.decay import layer_slopes

# What the host calls the cache argument: the name changed in 5.2x.
_CACHE = "cache" if "cache" in inspect.signature(MiniMaxModel.forward).parameters else "past_key_values"


class LightningCache(MiniMaxCache):
    """Keys and values of the softmax layers, fp32 states of the linear ones; every verb of a cache reaches both.

    Args:
        layer_types: `config.layer_types`.
    """

    def __init__(self, layer_types: list[str]) -> None:
        layers = [RecurrentLayer() if kind == "linear_attention" else DynamicLayer() for kind in layer_types]
        Cache.__init__(self, layers=layers)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """As the host's."""
        return self.layers[layer_idx].state.get("state")

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Raises RuntimeError: a state is kept with the number of tokens behind it, see `MendedLightning`."""
        raise RuntimeError(
            "this cache was made by hf_attn.apply(model, 'lightning') and is used by a model without the repair; "
            "apply it to that model too, or start with a new cache"
        )

    def __len__(self) -> int:
        return len(self.layers)

    reorder_cache = Cache.reorder_cache
    batch_repeat_interleave = Cache.batch_repeat_interleave
    batch_select_indices = Cache.batch_select_indices
    reset = Cache.reset

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless there is nothing to forget."""
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.crop(tokens_to_remove)


class MendedLightning(MiniMaxLightningAttention):
    """The host's layer with blocks, states in fp32 and constants that are not cast with the weights."""

    def _slopes(self, device: torch.device) -> Tensor:
        slopes = self.__dict__.get("_exact_slopes")
        if slopes is None or slopes.device != device:
            slopes = layer_slopes(self.num_attention_heads, self.layer_idx, self.num_hidden_layers, "minimax")
            slopes = self.__dict__["_exact_slopes"] = slopes.to(device)
        return slopes

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """`[B, N, width]` -> the same, and the state `[B, H, D, D]` fp32 behind the last token."""
        qkv = self.act_fn(self.qkv_proj(hidden_states)).unflatten(-1, (self.num_attention_heads, -1))
        query, key, value = qkv.transpose(1, 2).split(self.head_dim, -1)
        cache, kept = kwargs.get(_CACHE), None
        if cache is not None:
            kept = cache.layers[self.layer_idx].state
            kept.check(hidden_states.shape[0], state=(self.num_attention_heads, self.head_dim, self.head_dim))
        out, state = ops.linear_attention(
            query,
            key,
            value,
            self._slopes(hidden_states.device),
            initial_state=None if kept is None else kept.get("state"),
            return_state=True,
            mask=attention_mask,
        )
        if kept is not None:
            kept.put(hidden_states.shape[1], state=state)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.out_proj(self.output_gate(hidden_states).sigmoid() * out), state


class MendedModel(MiniMaxModel):
    """The host's decoder, which makes and takes caches that know their linear states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's."""
        bound = inspect.signature(MiniMaxModel.forward).bind_partial(self, *args, **kwargs).arguments
        cache, wanted = bound.get(_CACHE), bound.get("use_cache")
        if cache is not None and not isinstance(cache, LightningCache):
            raise ValueError(
                f"{_CACHE} must be None or a LightningCache of an earlier call, got {type(cache).__name__}: the host's "
                "caches do not reorder linear states; leave it out, and the model makes one"
            )
        if wanted is None:
            wanted = self.config.use_cache and not self.training
        if cache is None and wanted and not (self.gradient_checkpointing and self.training):
            kwargs[_CACHE] = LightningCache(self.config.layer_types)
        return super().forward(*args, **kwargs)


def install(model: PreTrainedModel) -> Undo:
    """Mend the linear layers of a MiniMax model; returns what undoes it.

    Raises ValueError, and changes nothing, when the decays in the checkpoint are not those of the formula.
    """
    layers = [module for module in model.modules() if isinstance(module, MiniMaxLightningAttention)]
    decoders = [module for module in model.modules() if isinstance(module, MiniMaxModel)]
    for layer in layers:
        _check_decay(layer)
    return together(become(layers, MendedLightning), become(decoders, MendedModel))


def _check_decay(layer: MiniMaxLightningAttention) -> None:
    wanted = layer_slopes(layer.num_attention_heads, layer.layer_idx, layer.num_hidden_layers, "minimax")
    found = layer.slope_rate.detach().float().cpu().flatten()
    # In a half-precision checkpoint the decays are rounded as the weights are; that is one of the faults.
    allowed = max(2 * torch.finfo(layer.slope_rate.dtype).eps, 1e-5)
    if not layer.slope_rate.is_meta and not torch.allclose(found, wanted, rtol=allowed, atol=1e-6):
        raise ValueError(
            f"layer {layer.layer_idx} has decays of its own (slope_rate {found.tolist()}, expected {wanted.tolist()}); "
            "the 'lightning' repair computes them from the formula and would change this model"
        )
