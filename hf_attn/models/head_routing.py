"""Mixture-of-Head attention in transformers' decoder models: what every family with it shares.

Three mixins go before a family's own Attention, Model and ForCausalLM. The host's constructors name their own classes,
so a finished model's parts change class afterwards instead of being built a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hf_attn.models.moh.configuration_moh import activated_share, layer_heads
from hf_attn.nn.head_router import HeadRouting, LearnedRouter, QueryNormRouter, load_balance

SKIPPING = "hf_attn_moh"


class HeadRoutedAttention:
    """Attention whose heads are gated by a router; `hf_attn_moh` computes only the chosen ones."""

    router: QueryNormRouter | LearnedRouter
    # Heads of the running call for the mechanism, bool [B, N, H]; the last routing, for losses and statistics.
    routed_heads: Tensor | None = None
    routing: HeadRouting | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's."""
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        routing = self.routing = self.router(query if self.router.needs_query else hidden_states)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        name = self.config._attn_implementation
        self.routed_heads = routing.heads if name == SKIPPING else None
        out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)(
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
        self.routed_heads = None
        out = out * routing.gates[..., None].to(out.dtype)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class HeadRoutedModel:
    """The base model: it builds the routers."""

    attention_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.add_routers()

    def add_routers(self) -> None:
        """Turn the attention modules into `attention_class`, each with a router."""
        for layer, heads in zip(self.layers, layer_heads(self.config), strict=True):
            layer.self_attn.__class__ = self.attention_class
            layer.self_attn.router = new_router(self.config, *heads)


class HeadRoutedForCausalLM:
    """The language model around a base model with head routers: it adds their load-balance loss."""

    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.add_routers()

    @property
    def activated_heads(self) -> float:
        """Share of the heads that a token computes."""
        return activated_share(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *arguments: Any,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the host's. `aux_loss` is the mean load-balance loss of the layers; training adds it to `loss`."""
        out = super().forward(input_ids, attention_mask, *arguments, labels=labels, **kwargs)
        if not isinstance(out, dict):
            return out
        loss, aux = out.loss, None
        if labels is not None:
            aux = self.load_balance_loss(attention_mask)
            if aux is not None and self.training:
                loss = loss + self.config.moh_aux_coef * aux.to(loss.device)
        # What later steps do not need would keep the graph of this one alive.
        for layer in self.model.layers:
            layer.self_attn.routing = _detached(layer.self_attn.routing)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def load_balance_loss(self, attention_mask: Any = None) -> Tensor | None:
        """Mean over the layers with routed heads of the last forward; None without such layers."""
        config, terms = self.config, []
        soft = config.moh_router == "learned" and config.moh_router_scaling != "quantized"
        form = config.moh_aux_form or ("code" if soft else "paper")
        for layer in self.model.layers:
            routing = layer.self_attn.routing
            if routing is None or routing.prob is None:
                continue
            real = None
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                real = attention_mask[:, -routing.prob.shape[1] :].bool().to(routing.prob.device)
            terms.append(load_balance(routing.prob, routing.chosen, form=form, real=real))
        return torch.stack([term.to(terms[0].device) for term in terms]).mean() if terms else None

    def head_load(self) -> list[list[float]]:
        """Share of the last forward's tokens that chose each routed head, for every layer (padding included)."""
        chosen = [layer.self_attn.routing for layer in self.model.layers]
        return [
            [] if routing is None or routing.chosen is None else routing.chosen.float().mean((0, 1)).tolist()
            for routing in chosen
        ]


def new_router(config: Any, shared: list[int], top_k: int, count: int) -> nn.Module:
    """The router of one layer."""
    if config.moh_router == "query_norm":
        group = config.num_attention_heads // count
        return QueryNormRouter(count, shared, top_k, group=group, ste=config.moh_ste)
    scaling, ste = config.moh_router_scaling, config.moh_ste
    return LearnedRouter(config.hidden_size, count, shared, top_k, scaling=scaling, ste=ste)


def _detached(routing: HeadRouting | None) -> HeadRouting | None:
    if routing is None or routing.prob is None or not routing.prob.requires_grad:
        return routing
    return HeadRouting(routing.gates.detach(), routing.heads, routing.chosen, routing.prob.detach())
