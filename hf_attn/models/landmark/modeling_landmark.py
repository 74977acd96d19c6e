"""Llama, Qwen2, Qwen3 and Mistral with landmark attention in every layer. Everything else is the host's."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from hf_attn.models.landmark.configuration_landmark import (
    LandmarkLlamaConfig,
    LandmarkMistralConfig,
    LandmarkQwen2Config,
    LandmarkQwen3Config,
)
from hf_attn.models.landmark.layers import LandmarkAttention, LandmarkForCausalLM, LandmarkModel


class LandmarkLlamaAttention(LandmarkAttention, LlamaAttention):
    """Llama's attention with a grouped softmax."""


class LandmarkLlamaModel(LandmarkModel, LlamaModel):
    """Llama's decoder with landmarks."""

    config_class = LandmarkLlamaConfig
    attention_class = LandmarkLlamaAttention


class LandmarkLlamaForCausalLM(LandmarkForCausalLM, LlamaForCausalLM):
    """Llama's language model with landmarks."""

    config_class = LandmarkLlamaConfig
    model_class = LandmarkLlamaModel


class LandmarkQwen2Attention(LandmarkAttention, Qwen2Attention):
    """Qwen2's attention with a grouped softmax."""


class LandmarkQwen2Model(LandmarkModel, Qwen2Model):
    """Qwen2's decoder with landmarks."""

    config_class = LandmarkQwen2Config
    attention_class = LandmarkQwen2Attention


class LandmarkQwen2ForCausalLM(LandmarkForCausalLM, Qwen2ForCausalLM):
    """Qwen2's language model with landmarks."""

    config_class = LandmarkQwen2Config
    model_class = LandmarkQwen2Model


class LandmarkQwen3Attention(LandmarkAttention, Qwen3Attention):
    """Qwen3's attention with a grouped softmax."""


class LandmarkQwen3Model(LandmarkModel, Qwen3Model):
    """Qwen3's decoder with landmarks."""

    config_class = LandmarkQwen3Config
    attention_class = LandmarkQwen3Attention


class LandmarkQwen3ForCausalLM(LandmarkForCausalLM, Qwen3ForCausalLM):
    """Qwen3's language model with landmarks."""

    config_class = LandmarkQwen3Config
    model_class = LandmarkQwen3Model


class LandmarkMistralAttention(LandmarkAttention, MistralAttention):
    """Mistral's attention with a grouped softmax."""


class LandmarkMistralModel(LandmarkModel, MistralModel):
    """Mistral's decoder with landmarks."""

    config_class = LandmarkMistralConfig
    attention_class = LandmarkMistralAttention


class LandmarkMistralForCausalLM(LandmarkForCausalLM, MistralForCausalLM):
    """Mistral's language model with landmarks."""

    config_class = LandmarkMistralConfig
    model_class = LandmarkMistralModel
