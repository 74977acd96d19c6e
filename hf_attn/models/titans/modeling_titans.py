"""Titans for transformers: decoders whose layers hold a memory (arXiv 2501.00663)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from hf_attn.caches.memory import MemoryState
from hf_attn.integrations.transformers.memory import MemoryLayer, TitansCache
from hf_attn.integrations.transformers.recurrent import packed_borders, real_tokens
from hf_attn.models.recurrent_lm import CACHE, language_model_output, wants_cache
from hf_attn.models.titans.attention import IMPLEMENTATIONS
from hf_attn.models.titans.configuration_titans import TitansConfig
from hf_attn.models.titans.mixers import TitansMixer, titans_mixer
from hf_attn.nn.neural_memory import NeuralMemory, rms_norm
from hf_attn.nn.ragged import put, real_first, take


class TitansNorm(nn.Module):
    """RMSNorm with a weight, in fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., d]` -> the same shape."""
        return rms_norm(hidden, self.weight, self.eps)


class TitansFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., d]` -> the same shape."""
        return self.down_proj(silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class TitansDecoderLayer(GradientCheckpointingLayer):
    """Mixer and feed-forward, each behind a norm and with a residual."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.mixer_norm = TitansNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = titans_mixer(config)
        self.feed_forward_norm = TitansNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = TitansFeedForward(config)

    def forward(
        self, hidden: Tensor, lengths: Tensor | None, store: MemoryState | None, tokens: int, frozen: bool
    ) -> Tensor:
        """`[B, N, D]`; `store` counts `tokens` more, padding included."""
        state = None if store is None else store.carried()
        mixed, state = self.mixer(self.mixer_norm(hidden), state, lengths, frozen=frozen)
        if store is not None:
            store.keep(tokens, state)
        hidden = hidden + mixed.to(hidden.dtype)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class TitansPreTrainedModel(PreTrainedModel):
    """Weights, initialisation, and what generation may do with the cache."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansDecoderLayer"]
    _supports_sdpa = True
    # A memory cannot be taken back: transformers refuses assisted decoding by this flag.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, NeuralMemory):
            initialise_memory(module)
        elif isinstance(module, TitansNorm):
            init.ones_(module.weight)
        elif isinstance(module, TitansMixer):
            for name in ("attention_norm", "memory_norm"):
                if hasattr(module, name):
                    init.ones_(getattr(module, name))
            if hasattr(module, "persistent"):
                init.normal_(module.persistent, mean=0.0, std=1.0)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def initialise_memory(module: NeuralMemory) -> None:
    """As `NeuralMemory.reset_parameters`, for the parameters that no checkpoint brought."""
    for weight in module.memory:
        init.normal_(weight, mean=0.0, std=weight.shape[1] ** -0.5)
    for name in ("q_conv", "k_conv", "v_conv") if module.conv_kernel else ():
        init.uniform_(getattr(module, name), 0, 2 / module.conv_kernel)
    init.copy_(module.k_proj.weight, module.q_proj.weight)
    for name, bias in module.biases.items():
        init.constant_(getattr(module, f"{name}_proj").bias, bias)
    init.ones_(module.norm)


class TitansModel(TitansPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        config.check_architecture()
        if config._attn_implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} does not take the masks of Titans; use one of "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([TitansDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = TitansNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: TitansCache | None = None,
        freeze_memory: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of every token.

        Args:
            input_ids, inputs_embeds: `[B, N]` or `[B, N, hidden_size]`, exactly one of them.
            attention_mask: `[B, N]` or `[B, past + N]`, 1 = real; padding may lie anywhere; states there are 0.
            position_ids: read only to refuse packed sequences.
            cache, past_key_values: a TitansCache (the second name is that of older versions).
            use_cache: make one when none is given; default `config.use_cache` outside training.
            output_hidden_states, return_dict: as everywhere in transformers.
            freeze_memory: read the memory, write nothing; default `config.freeze_memory`.

        Raises ValueError for a mask of pairs, for packed sequences, and for a cache of another model or batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache, hidden.shape[0])
        past, length = (0 if cache is None else cache.get_seq_length()), hidden.shape[1]
        if not past and packed_borders(position_ids, length) is not None:
            raise ValueError("Titans has no packed sequences: give them as rows of a batch, with an attention_mask")
        mask, _ = real_tokens(attention_mask, past, length)
        order = lengths = None
        if mask is not None and not bool(mask.all()):
            order, lengths = real_first(mask)
            order = order[:, : max(int(lengths.max()), 1)]
            hidden = take(hidden, order)
        frozen = self.config.freeze_memory if freeze_memory is None else freeze_memory
        seen = [hidden]
        for index, layer in enumerate(self.layers):
            store = None if cache is None else cache.layers[index].state
            hidden = layer(hidden, lengths, store, length, frozen)
            seen.append(hidden)
        if order is not None and lengths is not None:
            shown = torch.arange(order.shape[1], device=order.device) < lengths[:, None]
            seen = [put(h * shown[..., None], order, length) for h in seen]
        hidden = self.norm(seen[-1])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = (*seen[:-1], hidden) if wanted else None
        output = BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _cache(self, cache: Any, use_cache: bool | None, batch: int) -> TitansCache | None:
        count = self.config.num_hidden_layers
        if cache is None:
            return TitansCache(count) if wants_cache(self, use_cache) else None
        layers = getattr(cache, "layers", ())
        if len(layers) != count or not all(isinstance(layer, MemoryLayer) for layer in layers):
            raise ValueError(
                f"Titans keeps memories; pass a TitansCache({count}) or none, got {type(cache).__name__} with "
                f"{len(layers)} layers"
            )
        shapes = [(batch, *weight.shape) for weight in self.layers[0].mixer.memory.memory]
        for layer in layers:
            held = [t for name, t in layer.state.carried().items() if name.startswith("weights.")]
            if held and [tuple(t.shape) for t in held] != shapes or (layer.state.batch or batch) != batch:
                raise ValueError(
                    f"the cache holds memories {[tuple(t.shape) for t in held]}, this step needs {shapes}: it was "
                    "filled with another batch or by another model; start with a new one"
                )
        return cache


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: TitansCache | None = None,
        freeze_memory: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits `[B, N, vocab_size]` and, with `labels` `[B, N]`, the next-token loss; see `TitansModel.forward`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            freeze_memory=freeze_memory,
            **kwargs,
        )
        return language_model_output(self, outputs, labels, logits_to_keep, return_dict, **kwargs)
