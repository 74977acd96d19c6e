"""TransNormerLLM for transformers. Parameters have the names of the published checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from hf_attn import ops
from hf_attn.integrations.transformers.recurrent import (
    RecurrentCache,
    RecurrentLayer,
    packed_borders,
    real_tokens,
)
from hf_attn.models.recurrent_lm import CACHE, language_model_output, wants_cache
from hf_attn.models.tnl.configuration_tnl import TnlConfig
from hf_attn.nn.decay import layer_slopes


def srms_norm(hidden: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) over the last dimension, in fp32; no weight (arXiv 2405.17381, eq. 8).

    hidden: `[..., d]`.
    """
    exact = hidden.float() if hidden.dtype != torch.float64 else hidden
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


class TnlLrpe(nn.Module):
    """Linearised relative positions: features cos and sin, so that products depend on distances only."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))

    def reset(self) -> None:
        """theta_j = 10000^(-2 j / (H D)), j over all heads' features."""
        with torch.no_grad():
            count = self.theta.numel()
            steps = torch.arange(count, dtype=torch.float64, device=self.theta.device)
            self.theta.copy_((10000 ** (-2 * steps / count)).view_as(self.theta))

    def forward(self, states: Tensor, positions: Tensor) -> Tensor:
        """`[B, H, N, D]` at positions `[B | 1, N]` -> `[B, H, N, 2 D]`."""
        angle = positions[:, None, :, None].float() * self.theta.float()
        return torch.cat([states * angle.cos().to(states.dtype), states * angle.sin().to(states.dtype)], -1)


class TnlTokenMixer(nn.Module):
    """Gated linear attention (specification of the layer: arXiv 2405.17381, section 3)."""

    def __init__(self, config: TnlConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        if config.gate_type == "linear":
            self.qkvu_proj = nn.Linear(width, 4 * width, bias=False)
        else:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
            self.gate_down = nn.Linear(width, config.gate_dim, bias=False)
            self.gate_up = nn.Linear(config.gate_dim, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        if layer_idx in config.lrpe_layers:
            self.lrpe = TnlLrpe(self.num_heads, width // self.num_heads)
        self._slopes: Tensor | None = None

    def slopes(self, device: torch.device) -> Tensor:
        """Decays of the heads, `[H]` fp32: constants, never cast with the model."""
        if self._slopes is None or self._slopes.device != device:
            config = self.config
            slopes = layer_slopes(self.num_heads, self.layer_idx, config.num_hidden_layers, config.slope_style)
            self._slopes = slopes.to(device)
        return self._slopes

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, borders: Tensor | None, store: Any
    ) -> Tensor:
        """`[B, N, width]`; `store` is this layer's RecurrentState, or None."""
        query, key, value, gate = self._project(hidden)
        if hasattr(self, "lrpe"):
            query, key = self.lrpe(query, positions), self.lrpe(key, positions)
        state = None
        if store is not None:
            store.check(hidden.shape[0], state=(self.num_heads, key.shape[3], value.shape[3]))
            state = store.get("state")
        out, state = ops.linear_attention(
            query,
            key,
            value,
            self.slopes(hidden.device),
            initial_state=state,
            return_state=True,
            mask=mask,
            cu_seqlens=borders,
            block_size=self.config.block_size,
        )
        if store is not None:
            store.put(hidden.shape[1], state=state)
        out = out.transpose(1, 2).flatten(2)
        if self.config.attn_norm == "srmsnorm":
            out = srms_norm(out, self.config.norm_eps)
        else:
            out = layer_norm(out, out.shape[-1:], eps=self.config.norm_eps)
        return self.out_proj(gate * out)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.config.gate_type == "linear":
            query, key, value, gate = self.qkvu_proj(hidden).chunk(4, -1)
        else:
            query, key, value = self.qkv_proj(hidden).chunk(3, -1)
            gate = self.gate_up(self.gate_down(hidden)).sigmoid()
        if self.config.v_act == "silu":
            value = silu(value)
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (silu(query), silu(key), value))
        return *heads, gate


class TnlChannelMixer(nn.Module):
    """Simple gated linear unit: (h A) * (h B), then C; no activation."""

    def __init__(self, config: TnlConfig) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, N, d]` -> the same shape."""
        return self.l3(self.l1(hidden) * self.l2(hidden))


class TnlDecoderLayer(GradientCheckpointingLayer):
    """Token mixer and channel mixer, each behind a norm and with a residual."""

    def __init__(self, config: TnlConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.token_mixer = TnlTokenMixer(config, layer_idx)
        self.channel_mixer = TnlChannelMixer(config)

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, borders: Tensor | None, store: Any
    ) -> Tensor:
        """hidden `[B, N, d]` -> the same shape; positions and mask `[B, N]`, borders of packed rows `[rows + 1]`."""
        hidden = hidden + self.token_mixer(srms_norm(hidden, self.eps), positions, mask, borders, store)
        return hidden + self.channel_mixer(srms_norm(hidden, self.eps))


class TnlPreTrainedModel(PreTrainedModel):
    """Weights, initialisation, and what generation may do with the cache."""

    config_class = TnlConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TnlDecoderLayer"]
    # States cannot be taken back: transformers refuses assisted decoding by this flag.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, TnlLrpe) and not getattr(module.theta, "_is_hf_initialized", False):
            module.reset()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class TnlModel(TnlPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: TnlConfig) -> None:
        super().__init__(config)
        config.validate_architecture()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([TnlDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of every token.

        Args:
            input_ids, inputs_embeds: `[B, N]` or `[B, N, hidden_size]`, exactly one of them.
            attention_mask: `[B, N]` or `[B, past + N]`, 1 = real; padding may lie anywhere.
            position_ids: `[1, N]`, only read where it restarts: packed sequences, whose states start anew.
            cache, past_key_values: a RecurrentCache (the second name is that of older versions).
            use_cache: make one when none is given; default `config.use_cache` outside training.
            output_hidden_states, return_dict: as everywhere in transformers.
            cu_seq_lens_q: int `[sequences + 1]`, borders of packed sequences.

        Raises ValueError for a mask of pairs, packing with a cache, and a cache of another model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if inputs_embeds is None and self.config.scale_embedding:
            hidden = hidden * math.sqrt(self.config.hidden_size)
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        past, length = (0 if cache is None else cache.get_seq_length()), hidden.shape[1]
        mask, positions = real_tokens(attention_mask, past, length)
        borders = cu_seq_lens_q if cu_seq_lens_q is not None or past else packed_borders(position_ids, length)
        if borders is not None:
            if cache is not None or mask is not None and not bool(mask.all()):
                raise ValueError(
                    "packed sequences (position_ids that restart, cu_seq_lens_q) go without a cache and without "
                    "padding; pass use_cache=False and no attention_mask"
                )
            mask, ends = None, borders.long()
            counts = torch.arange(length, device=hidden.device)
            positions = (counts - ends[torch.searchsorted(ends, counts, right=True) - 1])[None]
        if positions is None:
            positions = torch.arange(past, past + length, device=hidden.device)[None]
        seen = [hidden]
        for index, layer in enumerate(self.layers):
            store = None if cache is None else cache.layers[index].state
            hidden = layer(hidden, positions, mask, borders, store)
            seen.append(hidden)
        hidden = srms_norm(hidden, self.config.norm_eps)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = (*seen[:-1], hidden) if wanted else None
        output = BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _cache(self, cache: Any, use_cache: bool | None) -> RecurrentCache | None:
        if cache is None:
            return RecurrentCache(self.config.num_hidden_layers) if wants_cache(self, use_cache) else None
        layers = getattr(cache, "layers", ())
        if len(layers) != self.config.num_hidden_layers or not all(isinstance(c, RecurrentLayer) for c in layers):
            raise ValueError(
                f"TNL keeps recurrent states; pass a RecurrentCache({self.config.num_hidden_layers}) or none, got "
                f"{type(cache).__name__} with {len(layers)} layers"
            )
        return cache


class TnlForCausalLM(TnlPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TnlConfig) -> None:
        super().__init__(config)
        self.model = TnlModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits `[B, N, vocab_size]` and, with `labels` `[B, N]`, the next-token loss; see `TnlModel.forward`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return language_model_output(self, outputs, labels, logits_to_keep, return_dict, **kwargs)
