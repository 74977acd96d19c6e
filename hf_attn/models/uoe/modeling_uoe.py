"""Llama, Qwen2, Qwen3 and Mistral whose blocks are unions of experts.

Weights keep the dense layout and names: an expert is a slice, so dense checkpoints load unchanged and adapters find
their modules. Only the gates are new.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralForCausalLM,
    MistralMLP,
    MistralModel,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP, Qwen3Model

from hf_attn import ops
from hf_attn.caches.selected import SelectedTokens
from hf_attn.integrations.transformers.selected import SelectedLayer
from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.host import HostModule
from hf_attn.models.key_convolution import add_key_mask, given_tokens, neighbours
from hf_attn.models.uoe.configuration_uoe import (
    UoeConfig,
    UoeLlamaConfig,
    UoeMistralConfig,
    UoeQwen2Config,
    UoeQwen3Config,
)
from hf_attn.models.uoe.marks import asking, mark
from hf_attn.nn.experts import Routing, gate_weights, pool_patches, route, spread_patches
from hf_attn.nn.head_router import load_balance


class _Gated(HostModule):
    """Routing of one block; `uoe_gate` is new, everything else is the host's."""

    uoe_gate: nn.Linear
    top_k: int
    routing: Routing | None = None

    def choose(self, hidden: Tensor, real: Tensor | None, forced: Tensor | None) -> tuple[Routing, Tensor]:
        """The routing of `[B, N, width]` and the experts' factors `[B, N, n]`; kept while training."""
        config = self.config
        logits = self.uoe_gate(pool_patches(hidden, config.uoe_patch_size, causal=True))
        logits = spread_patches(logits, config.uoe_patch_size, hidden.shape[1])
        found = route(logits, self.top_k, real=real, forced=forced)
        self.routing = found if self.training else None
        options = {"eps": config.uoe_score_eps, "scale": config.uoe_score_scale}
        return found, gate_weights(found, config.uoe_gate_mode, **options)


class UoeAttention(_Gated):
    """Selective multi-head attention: an expert is one KV head, or several, with its query heads.

    With `uoe_kv_shared` it is some query heads of a KV head, whose keys and values serve the tokens of any of them.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        uoe_tokens: tuple[Tensor | None, Tensor | None, bool] = (None, None, False),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's; `uoe_tokens`: real tokens and forced ones (bool `[B, N]` or None), and if rows are packed."""
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        real, forced, packed = uoe_tokens
        routing, factors = self.choose(hidden_states, real, forced)
        # [B, Hkv, experts that share the head, N]
        chosen = routing.selected.transpose(1, 2)
        if chosen.shape[1] < key.shape[1]:
            chosen = chosen.repeat_interleave(key.shape[1] // chosen.shape[1], 1)
        chosen = chosen.unflatten(1, (key.shape[1], -1))
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        alone = isinstance(past, int) and past == 0 and not packed and not torch.compiler.is_compiling()
        states, weights = (query, key, value, chosen), None
        if cache is not None and isinstance(cache.layers[self.layer_idx], SelectedLayer):
            out = self._attend_chosen(cache.layers[self.layer_idx].store, *states, alone)
        elif alone and not kwargs.get("output_attentions"):
            if cache is not None:
                cache.update(mark(key, chosen), value, self.layer_idx)
            out = self._attend_alone(*states)
        else:
            out, weights = self._attend_marked(cache, *states, attention_mask, **kwargs)
        factors = factors.repeat_interleave(out.shape[2] // factors.shape[-1], -1)[..., None]
        out = torch.where(factors == 0, 0, out * factors.to(out.dtype))
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
        """Whole sequences without a past, `[B, N, Hq, D]`."""
        key, value = (x.repeat_interleave(chosen.shape[2], 1) for x in (key, value))
        selected = chosen.flatten(1, 2).contiguous()
        return ops.selective_attention(query, key, value, selected, causal=True, scale=self.scaling).transpose(1, 2)

    def _attend_chosen(
        self, store: SelectedTokens, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, alone: bool
    ) -> Tensor:
        """Over lists of chosen tokens, `[B, N, Hq, D]`; a shared KV head lists what any of its experts chose."""
        shared = chosen.shape[2] > 1
        store.append(mark(key, chosen) if shared else key, value, chosen.any(2))
        if alone:
            return self._attend_alone(query, key, value, chosen)
        if shared:
            query = asking(query, chosen, self.scaling)
        keys, values, seen = store.read(query.shape[2])
        group = query.shape[1] // key.shape[1]
        keys, values, seen = (t.repeat_interleave(group, 1) for t in (keys, values, seen))
        out = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=self.scaling)
        return out.transpose(1, 2)

    def _attend_marked(
        self,
        cache: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chosen: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Over marked keys, by the host's attention: `[B, N, Hq, D]`, and weights where it gives them."""
        key, query = mark(key, chosen), asking(query, chosen, self.scaling)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)


class UoeMLP(_Gated):
    """A gated MLP whose inner features are shared out among experts."""

    uoe_tokens: tuple[Tensor | None, Tensor | None] = (None, None)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, N, width]` -> the same shape."""
        routing, factors = self.choose(hidden, *self.uoe_tokens)
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if all(type(projection) is nn.Linear for projection in projections):
            return self._sliced(hidden, routing.selected, factors)
        # Adapters and quantised layers are no slices: all features, and a mask.
        inner = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        share = factors.to(inner.dtype).repeat_interleave(inner.shape[-1] // factors.shape[-1], -1)
        return self.down_proj(inner * share)

    def _sliced(self, hidden: Tensor, selected: Tensor, factors: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        chosen, factors = selected.flatten(0, 1), factors.flatten(0, 1).to(hidden.dtype)
        out = torch.zeros_like(flat)
        weights = zip(
            self.gate_proj.weight.chunk(chosen.shape[1]),
            self.up_proj.weight.chunk(chosen.shape[1]),
            self.down_proj.weight.chunk(chosen.shape[1], 1),
            strict=True,
        )
        biases = [[None] * chosen.shape[1] if p.bias is None else p.bias.chunk(chosen.shape[1]) for p in self._inner()]
        for expert, (gate, up, down) in enumerate(weights):
            index = chosen[:, expert].nonzero()[:, 0]
            x = flat[index]
            inner = self.act_fn(linear(x, gate, biases[0][expert])) * linear(x, up, biases[1][expert])
            out = out.index_add(0, index, linear(inner, down) * factors[index, expert, None])
        if self.down_proj.bias is not None:
            out = out + self.down_proj.bias
        return out.view_as(hidden)

    def _inner(self) -> tuple[nn.Linear, nn.Linear]:
        return self.gate_proj, self.up_proj


class UoeModel(CardOnPush):
    """The base model: it builds the gates and tells every layer which tokens are real."""

    attention_class: type
    mlp_class: type

    def __init__(self, config: UoeConfig) -> None:
        super().__init__(config)
        self.add_gates()

    def add_gates(self) -> None:
        """Turn the blocks of the chosen layers into unions of experts."""
        config = self.config
        config.check_experts()
        for index in range(config.num_hidden_layers) if config.uoe_layers is None else config.uoe_layers:
            attention, mlp = self.layers[index].self_attn, self.layers[index].mlp
            if config.uoe_attn_top_k is not None:
                attention.__class__, attention.top_k = self.attention_class, config.uoe_attn_top_k
                attention.uoe_gate = nn.Linear(config.hidden_size, config.attention_experts(), config.uoe_gate_bias)
            if config.uoe_mlp_top_k is not None:
                mlp.__class__, mlp.top_k = self.mlp_class, config.uoe_mlp_top_k
                mlp.uoe_gate = nn.Linear(config.hidden_size, config.uoe_mlp_experts, config.uoe_gate_bias)

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
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        if self.config.uoe_patch_size > 1 and (cache is not None or kwargs.get("use_cache")):
            raise ValueError(
                f"uoe_patch_size={self.config.uoe_patch_size} routes patches by their first token, which a cache does "
                "not keep; pass use_cache=False"
            )
        mask = attention_mask if key_mask is None else key_mask
        ids = neighbours(tokens.shape[1], mask, position_ids, kwargs.get("cu_seq_lens_q"))
        real = None if ids is None else ids >= 0
        packed = ids is not None and bool((ids > 0).any())
        forced = self._forced(tokens, mask, ids, past)
        for layer in self.layers:
            if isinstance(layer.mlp, UoeMLP):
                layer.mlp.uoe_tokens = (real, forced)
        return super().forward(
            input_ids, attention_mask, position_ids, *arguments, uoe_tokens=(real, forced, packed), **kwargs
        )

    def _forced(self, tokens: Tensor, mask: Any, ids: Tensor | None, past: Any) -> Tensor | None:
        """Which of the new tokens are among the first of their sequence, bool `[B, N]`; None for none."""
        first, length = self.config.uoe_always_select_first, tokens.shape[1]
        if not first:
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ranks = mask.long().cumsum(1)[:, -length:] - 1
            if mask.shape[1] == length:
                ranks = ranks + past
        elif ids is not None:
            starts = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids.diff(dim=1) != 0], 1)
            slots = torch.arange(length, device=ids.device).expand_as(ids)
            ranks = slots - torch.where(starts, slots, 0).cummax(1).values
        else:
            ranks = (torch.arange(length, device=tokens.device) + past).expand(tokens.shape[0], length)
        return ranks < first


class UoeForCausalLM(CardOnPush):
    """The language model; its loss holds the gates' load balance."""

    model_class: type

    def __init__(self, config: UoeConfig) -> None:
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.add_gates()
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        host = super().forward

        # With the host's signature: generation and the Trainer read the names of arguments from it.
        @functools.wraps(host)
        def forward(self: Any, *arguments: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            outputs = host(self, *arguments, labels=labels, **kwargs)
            return outputs if labels is None else self.add_balance(outputs, labels, kwargs.get("attention_mask"))

        cls.forward = forward

    def add_balance(self, outputs: Any, labels: Tensor, mask: Any) -> Any:
        """In training the loss plus uoe_balance * aux_loss, which is returned too.

        labels: int64 `[B, N]`; mask: `[B, N]` or None.
        """
        found = [m.routing for m in self.modules() if isinstance(m, _Gated) and m.routing is not None]
        if not found or not self.training:
            return outputs
        real = mask.bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else None
        aux = torch.stack([load_balance(r.probabilities, r.chosen, real=real) for r in found]).mean()
        if isinstance(outputs, tuple):
            return outputs[0] + self.config.uoe_balance * aux, *outputs[1:]
        outputs["loss"] = outputs["loss"] + self.config.uoe_balance * aux
        return MoeCausalLMOutputWithPast(**outputs, aux_loss=aux)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """As the host's. Compileable caches get prepared masks, which no longer say where padding is: it is added."""
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        add_key_mask(inputs, kwargs.get("attention_mask"))
        return inputs


class UoeLlamaAttention(UoeAttention, LlamaAttention):
    """Llama's attention as a union of experts."""


class UoeLlamaMLP(UoeMLP, LlamaMLP):
    """Llama's MLP as a union of experts."""


class UoeLlamaModel(UoeModel, LlamaModel):
    """Llama's decoder as unions of experts."""

    config_class = UoeLlamaConfig
    attention_class, mlp_class = UoeLlamaAttention, UoeLlamaMLP


class UoeLlamaForCausalLM(UoeForCausalLM, LlamaForCausalLM):
    """Llama's language model as unions of experts."""

    config_class = UoeLlamaConfig
    model_class = UoeLlamaModel


class UoeQwen2Attention(UoeAttention, Qwen2Attention):
    """Qwen2's attention as a union of experts."""


class UoeQwen2MLP(UoeMLP, Qwen2MLP):
    """Qwen2's MLP as a union of experts."""


class UoeQwen2Model(UoeModel, Qwen2Model):
    """Qwen2's decoder as unions of experts."""

    config_class = UoeQwen2Config
    attention_class, mlp_class = UoeQwen2Attention, UoeQwen2MLP


class UoeQwen2ForCausalLM(UoeForCausalLM, Qwen2ForCausalLM):
    """Qwen2's language model as unions of experts."""

    config_class = UoeQwen2Config
    model_class = UoeQwen2Model


class UoeQwen3Attention(UoeAttention, Qwen3Attention):
    """Qwen3's attention as a union of experts."""


class UoeQwen3MLP(UoeMLP, Qwen3MLP):
    """Qwen3's MLP as a union of experts."""


class UoeQwen3Model(UoeModel, Qwen3Model):
    """Qwen3's decoder as unions of experts."""

    config_class = UoeQwen3Config
    attention_class, mlp_class = UoeQwen3Attention, UoeQwen3MLP


class UoeQwen3ForCausalLM(UoeForCausalLM, Qwen3ForCausalLM):
    """Qwen3's language model as unions of experts."""

    config_class = UoeQwen3Config
    model_class = UoeQwen3Model


class UoeMistralAttention(UoeAttention, MistralAttention):
    """Mistral's attention as a union of experts."""


class UoeMistralMLP(UoeMLP, MistralMLP):
    """Mistral's MLP as a union of experts."""


class UoeMistralModel(UoeModel, MistralModel):
    """Mistral's decoder as unions of experts."""

    config_class = UoeMistralConfig
    attention_class, mlp_class = UoeMistralAttention, UoeMistralMLP


class UoeMistralForCausalLM(UoeForCausalLM, MistralForCausalLM):
    """Mistral's language model as unions of experts."""

    config_class = UoeMistralConfig
    model_class = UoeMistralModel
