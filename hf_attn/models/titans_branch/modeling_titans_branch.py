"""Pretrained decoders with a memory beside the attention of some layers: out = attention(x) + gain * memory(x).

The gain is one number a channel and begins at 0, so a converted model is the base model; only what is called
`titans` is to be trained. Everything else is the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from hf_attn.integrations.transformers.memory_branch import memory_entry
from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.host import HostAttention
from hf_attn.models.key_convolution import add_key_mask, given_tokens, neighbours
from hf_attn.models.titans.modeling_titans import initialise_memory
from hf_attn.models.titans_branch.configuration_titans_branch import (
    TitansBranchConfig,
    TitansLlamaConfig,
    TitansMistralConfig,
    TitansQwen2Config,
    TitansQwen3Config,
)
from hf_attn.nn.neural_memory import NeuralMemory
from hf_attn.nn.ragged import put, real_first, take


class TitansBranch(nn.Module):
    """gain * memory(x), 0 in a new branch."""

    def __init__(self, config: TitansBranchConfig) -> None:
        super().__init__()
        self.memory = NeuralMemory(
            config.hidden_size,
            config.titans_num_heads,
            depth=config.titans_depth,
            inner_size=config.titans_inner_size,
            chunk_size=config.titans_chunk_size,
            conv_kernel=config.titans_conv_kernel,
            theta_max=config.titans_theta_max,
            norm_eps=config.rms_norm_eps,
            max_inner_grad_norm=config.titans_max_inner_grad_norm,
        )
        self.gain = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden: Tensor, store: Any, order: Tensor | None, lengths: Tensor | None, frozen: bool) -> Tensor:
        """`[B, N, D]`; `order` and `lengths` bring the real tokens to the front, None when all are real."""
        stream = hidden if order is None else take(hidden, order)
        state = None if store is None else store.carried()
        read, state = self.memory(stream, state, lengths, frozen=frozen)
        if store is not None:
            store.keep(hidden.shape[1], state)
        if order is not None:
            read = put(read, order, hidden.shape[1])
        return self.gain * read


class TitansBranchAttention(HostAttention):
    """The host's attention and, in the chosen layers, a branch beside it; None elsewhere."""

    titans: TitansBranch | None

    def forward(
        self, hidden_states: Tensor, *arguments: Any, titans_rows: tuple | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's; `titans_rows` is (memories of the cache or None, order, lengths)."""
        out, weights = super().forward(hidden_states, *arguments, **kwargs)
        if self.titans is None:
            return out, weights
        entry, order, lengths = titans_rows or (None, None, None)
        store = None if entry is None else entry.state(self.layer_idx)
        branch = self.titans(hidden_states, store, order, lengths, self.config.titans_freeze_memory)
        return out + branch.to(out.dtype), weights


class TitansBranchModel(CardOnPush):
    """The base model: it builds the branches and tells them which tokens are real."""

    attention_class: type

    def __init__(self, config: TitansBranchConfig) -> None:
        super().__init__(config)
        self.add_memories()

    def add_memories(self) -> None:
        """Turn the attention modules into `attention_class` and give the chosen layers a branch."""
        chosen = self.config.memory_layers()
        for index, layer in enumerate(self.layers):
            layer.self_attn.__class__ = self.attention_class
            layer.self_attn.titans = TitansBranch(self.config) if index in chosen else None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _initialise(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *arguments: Any,
        key_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the host's; `key_mask` `[B, N]` (1 = real) says where padding is when `attention_mask` is not 2-D."""
        tokens = given_tokens(input_ids, kwargs)
        mask = attention_mask if key_mask is None else key_mask
        ids = neighbours(tokens.shape[1], mask, position_ids, kwargs.get("cu_seq_lens_q"))
        order = lengths = None
        if ids is not None:
            if bool((ids > 0).any()):
                raise ValueError("memories have no packed sequences: give them as rows of a batch, with attention_mask")
            order, lengths = real_first(ids >= 0)
            order = order.expand(tokens.shape[0], -1)
            lengths = lengths.expand(tokens.shape[0])
        name = "cache" if "cache" in kwargs else "past_key_values"
        wanted = self.config.use_cache if use_cache is None else use_cache
        if wanted and kwargs.get(name) is None and not self.training:
            from transformers import DynamicCache

            kwargs[name] = DynamicCache(config=self.config)
        entry = None if kwargs.get(name) is None else memory_entry(kwargs[name], self.config.num_hidden_layers)
        rows = (entry, order, lengths)
        return super().forward(
            input_ids, attention_mask, position_ids, *arguments, use_cache=use_cache, titans_rows=rows, **kwargs
        )


class TitansBranchForCausalLM(CardOnPush):
    """The language model around a base model with memories."""

    model_class: type
    # A memory cannot be taken back: transformers refuses assisted decoding by this flag.
    _is_stateful = True

    def __init__(self, config: TitansBranchConfig) -> None:
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.add_memories()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _initialise(module)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """As the host's. Compileable caches get prepared masks, which no longer say where padding is: it is added."""
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        add_key_mask(inputs, kwargs.get("attention_mask"))
        return inputs


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, NeuralMemory):
        initialise_memory(module)
    elif isinstance(module, TitansBranch):
        init.zeros_(module.gain)


class TitansLlamaAttention(TitansBranchAttention, LlamaAttention):
    """Llama's attention with a memory beside it."""


class TitansLlamaModel(TitansBranchModel, LlamaModel):
    """Llama's decoder with memories."""

    config_class = TitansLlamaConfig
    attention_class = TitansLlamaAttention


class TitansLlamaForCausalLM(TitansBranchForCausalLM, LlamaForCausalLM):
    """Llama's language model with memories."""

    config_class = TitansLlamaConfig
    model_class = TitansLlamaModel


class TitansQwen2Attention(TitansBranchAttention, Qwen2Attention):
    """Qwen2's attention with a memory beside it."""


class TitansQwen2Model(TitansBranchModel, Qwen2Model):
    """Qwen2's decoder with memories."""

    config_class = TitansQwen2Config
    attention_class = TitansQwen2Attention


class TitansQwen2ForCausalLM(TitansBranchForCausalLM, Qwen2ForCausalLM):
    """Qwen2's language model with memories."""

    config_class = TitansQwen2Config
    model_class = TitansQwen2Model


class TitansQwen3Attention(TitansBranchAttention, Qwen3Attention):
    """Qwen3's attention with a memory beside it."""


class TitansQwen3Model(TitansBranchModel, Qwen3Model):
    """Qwen3's decoder with memories."""

    config_class = TitansQwen3Config
    attention_class = TitansQwen3Attention


class TitansQwen3ForCausalLM(TitansBranchForCausalLM, Qwen3ForCausalLM):
    """Qwen3's language model with memories."""

    config_class = TitansQwen3Config
    model_class = TitansQwen3Model


class TitansMistralAttention(TitansBranchAttention, MistralAttention):
    """Mistral's attention with a memory beside it."""


class TitansMistralModel(TitansBranchModel, MistralModel):
    """Mistral's decoder with memories."""

    config_class = TitansMistralConfig
    attention_class = TitansMistralAttention


class TitansMistralForCausalLM(TitansBranchForCausalLM, MistralForCausalLM):
    """Mistral's language model with memories."""

    config_class = TitansMistralConfig
    model_class = TitansMistralModel
