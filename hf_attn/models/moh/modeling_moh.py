"""Llama, Qwen2, Qwen3 and Mistral with Mixture-of-Head attention.

Everything but the routers is the host's. All heads are computed and gated under any `attn_implementation`;
`hf_attn_moh` computes only those that a token chose.
"""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from hf_attn.models.head_routing import HeadRoutedAttention, HeadRoutedForCausalLM, HeadRoutedModel
from hf_attn.models.moh.configuration_moh import MoHLlamaConfig, MoHMistralConfig, MoHQwen2Config, MoHQwen3Config


class MoHLlamaAttention(HeadRoutedAttention, LlamaAttention):
    """Llama's attention with a head router."""


class MoHLlamaModel(HeadRoutedModel, LlamaModel):
    """Llama's decoder with head routers."""

    config_class = MoHLlamaConfig
    attention_class = MoHLlamaAttention


class MoHLlamaForCausalLM(HeadRoutedForCausalLM, LlamaForCausalLM):
    """Llama's language model with head routers."""

    config_class = MoHLlamaConfig
    model_class = MoHLlamaModel


class MoHQwen2Attention(HeadRoutedAttention, Qwen2Attention):
    """Qwen2's attention with a head router."""


class MoHQwen2Model(HeadRoutedModel, Qwen2Model):
    """Qwen2's decoder with head routers."""

    config_class = MoHQwen2Config
    attention_class = MoHQwen2Attention


class MoHQwen2ForCausalLM(HeadRoutedForCausalLM, Qwen2ForCausalLM):
    """Qwen2's language model with head routers."""

    config_class = MoHQwen2Config
    model_class = MoHQwen2Model


class MoHQwen3Attention(HeadRoutedAttention, Qwen3Attention):
    """Qwen3's attention with a head router."""


class MoHQwen3Model(HeadRoutedModel, Qwen3Model):
    """Qwen3's decoder with head routers."""

    config_class = MoHQwen3Config
    attention_class = MoHQwen3Attention


class MoHQwen3ForCausalLM(HeadRoutedForCausalLM, Qwen3ForCausalLM):
    """Qwen3's language model with head routers."""

    config_class = MoHQwen3Config
    model_class = MoHQwen3Model


class MoHMistralAttention(HeadRoutedAttention, MistralAttention):
    """Mistral's attention with a head router."""


class MoHMistralModel(HeadRoutedModel, MistralModel):
    """Mistral's decoder with head routers."""

    config_class = MoHMistralConfig
    attention_class = MoHMistralAttention


class MoHMistralForCausalLM(HeadRoutedForCausalLM, MistralForCausalLM):
    """Mistral's language model with head routers."""

    config_class = MoHMistralConfig
    model_class = MoHMistralModel
