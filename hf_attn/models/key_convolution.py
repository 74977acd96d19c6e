"""Key convolution in transformers' decoder models: what every family with it shares.

Three mixins go before a family's own Attention, Model and ForCausalLM. The host's constructors name their own classes,
so a finished model's parts change class afterwards instead of being built a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hf_attn.integrations.transformers.key_history import key_history
from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.host import HostAttention
from hf_attn.nn.key_convolution import KeyConvolution


class KeyConvolutionAttention(HostAttention):
    """Attention whose keys pass a short causal convolution: after k_norm, before the rotary embedding.

    `k_conv1d` is `None` in layers without one.
    """

    k_conv1d: KeyConvolution | None
    rotary = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        key_sequences: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's; `key_sequences` int `[B, N]` says which tokens are neighbours, -1 for padding."""
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if self.k_conv1d is not None:
            key = self._convolve(self.k_conv1d, key, cache, key_sequences)
        if self.rotary:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            # Mistral keeps its window in the config, Qwen in the layer, Llama has none.
            sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _convolve(self, convolution: KeyConvolution, key: Tensor, cache: Any, sequences: Tensor | None) -> Tensor:
        if cache is None:
            return convolution(key, sequence_ids=sequences)
        history = key_history(cache, self.config.num_hidden_layers, self.config.kconv_width, self.layer_idx)
        key_out, rows = convolution(
            key, initial_state=history.read(self.layer_idx, key), return_state=True, sequence_ids=sequences
        )
        history.write(self.layer_idx, rows, key.shape[2])
        return key_out


class KeyConvolutionModel(CardOnPush):
    """The base model: it builds the convolutions and tells every layer which tokens are neighbours."""

    attention_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.add_key_convolutions()

    def add_key_convolutions(self) -> None:
        """Turn the attention modules into `attention_class` and give the layers of `kconv_layers` a convolution."""
        chosen = convolution_layers(self.config)
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            attention.__class__ = self.attention_class
            channels = self.config.num_key_value_heads * attention.head_dim
            attention.k_conv1d = (
                KeyConvolution(channels, self.config.kconv_width, self.config.kconv_init) if index in chosen else None
            )

    def _init_weights(self, module: nn.Module) -> None:
        initialise(super()._init_weights, module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *arguments: Any,
        key_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's; `key_mask` `[B, N]` (1 = real) says where padding is when `attention_mask` is not 2-D."""
        tokens = given_tokens(input_ids, kwargs)
        mask = attention_mask if key_mask is None else key_mask
        ids = neighbours(tokens.shape[1], mask, position_ids, kwargs.get("cu_seq_lens_q"))
        if ids is not None:
            kwargs["key_sequences"] = ids
        return super().forward(input_ids, attention_mask, position_ids, *arguments, **kwargs)


class KeyConvolutionForCausalLM(CardOnPush):
    """The language model around a base model with key convolutions."""

    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.add_key_convolutions()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(super()._init_weights, module)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """As the host's. Compileable caches get prepared masks, which no longer say where padding is: it is added."""
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        add_key_mask(inputs, kwargs.get("attention_mask"))
        return inputs


def add_key_mask(inputs: dict[str, Any], mask: Any) -> None:
    """Put `key_mask` of the new tokens into a model's inputs where their mask is prepared and no longer 2-D."""
    prepared = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or prepared is mask:
        return
    given = inputs.get("input_ids")
    length = (inputs["inputs_embeds"] if given is None else given).shape[1]
    # Single tokens are real, and their compiled step should not get inputs that grow.
    if length > 1 and not (isinstance(prepared, Tensor) and prepared.dim() == 2):
        inputs["key_mask"] = mask[:, -length:]


@torch.no_grad()
def initialise(host: Any, module: nn.Module) -> None:
    """Draw the weights of one module: ours as its `init` says, others as the host does."""
    if not isinstance(module, KeyConvolution):
        host(module)
    elif not getattr(module.weight, "_is_hf_initialized", False):
        module.reset_parameters()


def convolution_layers(config: Any) -> set[int]:
    """Indices of the layers with a convolution; raises ValueError for indices that no layer has."""
    count = config.num_hidden_layers
    if not config.kconv_width:
        return set()
    layers = range(count) if config.kconv_layers is None else config.kconv_layers
    for index in layers:
        if not 0 <= index < count:
            raise ValueError(f"kconv_layers names layer {index}, but the model has {count} layers (0 to {count - 1})")
    return set(layers)


def given_tokens(input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """The ids `[B, N]`, or the embeddings `[B, N, width]` given instead of them; ValueError where neither is."""
    tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    if tokens is None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return tokens


def neighbours(length: int, mask: Any, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Sequence ids `[B, length]` of the new tokens, -1 for padding; `None` when all are real and of one sequence.

    Args:
        mask: a 2-D mask `[B, past + length]` (1 = real); masks of another kind say nothing here.
        position_ids: packed rows restart or jump, as in transformers, which looks at them only without a mask.
        cu_seqlens: int `[sequences + 1]` of one packed row; wins over position ids.
    """
    if length == 1:
        return None
    eager = not torch.compiler.is_compiling()
    real = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if real is not None and eager and bool(real.all()):
        real = None
    ids = None
    if cu_seqlens is not None:
        slots = torch.arange(length, device=cu_seqlens.device)
        ids = torch.searchsorted(cu_seqlens.to(torch.int64), slots, right=True)[None]
    elif mask is None and position_ids is not None and position_ids.dim() == 2:
        jumps = position_ids.diff(dim=1) != 1
        if not eager or bool(jumps.any()):
            ids = torch.cat([torch.zeros_like(jumps[:, :1]), jumps], 1).cumsum(1)
    if real is None:
        return ids
    return torch.where(real, 0 if ids is None else ids, -1)
