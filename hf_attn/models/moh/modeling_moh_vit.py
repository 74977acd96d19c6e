"""ViT with Mixture-of-Head attention: bidirectional; the class token is routed like every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTForImageClassification,
    ViTModel,
    eager_attention_forward,
)

from hf_attn.models.head_routing import HeadRoutedHead, HeadRoutedModel, RoutedAttention
from hf_attn.models.moh.configuration_moh import MoHViTConfig


@dataclass
class MoHImageClassifierOutput(ImageClassifierOutput):
    """As the host's, and `aux_loss`, the mean load-balance loss of the layers; None without labels."""

    aux_loss: Tensor | None = None


class MoHViTAttention(RoutedAttention, ViTAttention):
    """ViT's attention with a head router."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the host's."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        routing = self.router(query if self.router.needs_query else hidden_states)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options = {"dropout": self.attention_dropout if self.training else 0.0, **kwargs}
        out, weights = self.attend(routing, eager_attention_forward, query, key, value, attention_mask, **options)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MoHViTModel(HeadRoutedModel, ViTModel):
    """ViT with head routers."""

    config_class = MoHViTConfig
    attention_class = MoHViTAttention
    attention_name = "attention"


class MoHViTForImageClassification(HeadRoutedHead, ViTForImageClassification):
    """ViT's classifier with head routers."""

    config_class = MoHViTConfig
    model_class = MoHViTModel

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoHImageClassifierOutput | tuple[Any, ...]:
        """As the host's. `aux_loss` is the mean load-balance loss of the layers; training adds it to `loss`."""
        out: Any = super().forward(pixel_values, labels, interpolate_pos_encoding, attention_mask, **kwargs)
        if isinstance(out, tuple):
            return out
        loss, aux = self.add_load_balance(out.loss, attention_mask)
        return MoHImageClassifierOutput(
            loss=loss, logits=out.logits, hidden_states=out.hidden_states, attentions=out.attentions, aux_loss=aux
        )
