"""Mixture-of-Head attention in transformers' models: what every family with it shares.

Mixins go before a family's own Attention, Model and model with a head. The host's constructors name their own classes,
so a finished model's parts change class afterwards instead of being built a second time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.host import HostAttention
from hf_attn.models.moh.configuration_moh import activated_share, layer_heads
from hf_attn.nn.head_router import HeadRouting, LearnedRouter, QueryNormRouter, load_balance

SKIPPING = "hf_attn_moh"


class RoutedAttention(HostAttention):
    """State of an attention module with a router."""

    router: QueryNormRouter | LearnedRouter
    # Heads of the running call for the mechanism, bool [B, N, H]; the last routing, for losses and statistics.
    routed_heads: Tensor | None = None
    routing: HeadRouting | None = None

    def attend(
        self, routing: HeadRouting, fallback: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Gated outputs of the heads `[B, N, H, D]` by the configured attention function, and weights if it has them.

        `hf_attn_moh` computes only the chosen heads; `fallback` is the host's eager attention.
        """
        name = self.config._attn_implementation
        self.routing, self.routed_heads = routing, routing.heads if name == SKIPPING else None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, fallback)
        out, weights = function(self, query, key, value, mask, scaling=self.scaling, **kwargs)
        self.routed_heads = None
        if routing.binary and name == SKIPPING:
            return out, weights
        return out * routing.gates[..., None].to(out.dtype), weights


class HeadRoutedAttention(RoutedAttention):
    """A decoder's attention whose heads are gated by a router."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
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
        routing = self.router(query if self.router.needs_query else hidden_states)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # Mistral keeps its window in the config, Qwen in the layer, Llama has none.
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        dropout = self.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "sliding_window": window, **kwargs}
        out, weights = self.attend(routing, eager_attention_forward, query, key, value, attention_mask, **options)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class HeadRoutedModel(CardOnPush):
    """The base model: it builds the routers."""

    attention_class: type
    # What the host calls the attention of a layer.
    attention_name = "self_attn"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.add_routers()

    def add_routers(self) -> None:
        """Turn the attention modules into `attention_class`, each with a router."""
        for layer, heads in zip(self.layers, layer_heads(self.config), strict=True):
            attention = getattr(layer, self.attention_name)
            attention.__class__ = self.attention_class
            attention.router = new_router(self.config, *heads)


class HeadRoutedHead(CardOnPush):
    """A model with a head around a base model with head routers: it knows their load and its loss."""

    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.base_model.__class__ = self.model_class
        self.base_model.add_routers()

    @property
    def activated_heads(self) -> float:
        """Share of the heads that a token computes."""
        return activated_share(self.config)

    def routed_attentions(self) -> list[RoutedAttention]:
        """The attention of every layer."""
        return [module for module in self.modules() if isinstance(module, RoutedAttention)]

    def load_balance_loss(self, mask: Any = None) -> Tensor | None:
        """Mean over the layers with routed heads of the last forward; None without such layers.

        Args:
            mask: `[B, N]`, 1 for tokens that count; others than 2-D tensors count all.
        """
        config, terms = self.config, []
        soft = config.moh_router == "learned" and config.moh_router_scaling != "quantized"
        form = config.moh_aux_form or ("code" if soft else "paper")
        for routing in (attention.routing for attention in self.routed_attentions()):
            prob = None if routing is None else routing.prob
            if routing is None or prob is None or routing.chosen is None:
                continue
            real = None
            if isinstance(mask, Tensor) and mask.dim() == 2:
                real = mask[:, -prob.shape[1] :].bool().to(prob.device)
            terms.append(load_balance(prob, routing.chosen, form=form, real=real))
        return torch.stack([term.to(terms[0].device) for term in terms]).mean() if terms else None

    def add_load_balance(self, loss: Tensor | None, mask: Any) -> tuple[Tensor | None, Tensor | None]:
        """The loss, in training with its load-balance term, and that term; None where there is none.

        Both are scalars; mask: `[B, N]`, true or 1 for real tokens, or None.
        """
        aux = None
        if loss is not None:
            aux = self.load_balance_loss(mask)
            if aux is not None and self.training:
                loss = loss + self.config.moh_aux_coef * aux.to(loss.device)
        # What later steps do not need would keep the graph of this one alive.
        for attention in self.routed_attentions():
            attention.routing = _detached(attention.routing)
        return loss, aux

    def head_load(self) -> list[list[float]]:
        """Share of the last forward's tokens that chose each routed head, for every layer (padding included)."""
        chosen = [attention.routing for attention in self.routed_attentions()]
        return [
            [] if routing is None or routing.chosen is None else routing.chosen.float().mean((0, 1)).tolist()
            for routing in chosen
        ]


class HeadRoutedForCausalLM(HeadRoutedHead):
    """The language model: it adds the load-balance loss."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        *arguments: Any,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """As the host's. `aux_loss` is the mean load-balance loss of the layers; training adds it to `loss`."""
        out: Any = super().forward(input_ids, attention_mask, *arguments, labels=labels, **kwargs)
        if isinstance(out, tuple):
            return out
        loss, aux = self.add_load_balance(out.loss, attention_mask)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def new_router(config: Any, shared: list[int], top_k: int, count: int) -> nn.Module:
    """The router of one layer."""
    if config.moh_router == "query_norm":
        group = config.num_attention_heads // count
        return QueryNormRouter(count, shared, top_k, group=group, ste=config.moh_ste)
    scaling, ste = config.moh_router_scaling, config.moh_ste
    return LearnedRouter(config.hidden_size, count, shared, top_k, scaling=scaling, ste=ste)


def _detached(routing: HeadRouting | None) -> HeadRouting | None:
    if routing is None or routing.scores is None or not routing.scores.requires_grad:
        return routing
    return replace(routing, gates=routing.gates.detach(), scores=routing.scores.detach())
