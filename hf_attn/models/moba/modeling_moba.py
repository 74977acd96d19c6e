"""Llama, Qwen2, Qwen3 and Mistral whose keys pass a short causal convolution.

Everything but the convolution is the host's. Which attention runs over the convolved keys is up to
`attn_implementation`: `hf_attn_moba` as published, or any other.
"""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from hf_attn.models.key_convolution import (
    KeyConvolutionAttention,
    KeyConvolutionForCausalLM,
    KeyConvolutionModel,
)
from hf_attn.models.moba.configuration_moba import (
    MobaLlamaConfig,
    MobaMistralConfig,
    MobaQwen2Config,
    MobaQwen3Config,
)


class MobaLlamaAttention(KeyConvolutionAttention, LlamaAttention):
    """Llama's attention with `k_conv1d`."""


class MobaLlamaModel(KeyConvolutionModel, LlamaModel):
    """Llama's decoder with key convolutions."""

    config_class = MobaLlamaConfig
    attention_class = MobaLlamaAttention


class MobaLlamaForCausalLM(KeyConvolutionForCausalLM, LlamaForCausalLM):
    """Llama's language model with key convolutions."""

    config_class = MobaLlamaConfig
    model_class = MobaLlamaModel


class MobaQwen2Attention(KeyConvolutionAttention, Qwen2Attention):
    """Qwen2's attention with `k_conv1d`."""


class MobaQwen2Model(KeyConvolutionModel, Qwen2Model):
    """Qwen2's decoder with key convolutions."""

    config_class = MobaQwen2Config
    attention_class = MobaQwen2Attention


class MobaQwen2ForCausalLM(KeyConvolutionForCausalLM, Qwen2ForCausalLM):
    """Qwen2's language model with key convolutions."""

    config_class = MobaQwen2Config
    model_class = MobaQwen2Model


class MobaQwen3Attention(KeyConvolutionAttention, Qwen3Attention):
    """Qwen3's attention with `k_conv1d`."""


class MobaQwen3Model(KeyConvolutionModel, Qwen3Model):
    """Qwen3's decoder with key convolutions."""

    config_class = MobaQwen3Config
    attention_class = MobaQwen3Attention


class MobaQwen3ForCausalLM(KeyConvolutionForCausalLM, Qwen3ForCausalLM):
    """Qwen3's language model with key convolutions."""

    config_class = MobaQwen3Config
    model_class = MobaQwen3Model


class MobaMistralAttention(KeyConvolutionAttention, MistralAttention):
    """Mistral's attention with `k_conv1d`."""


class MobaMistralModel(KeyConvolutionModel, MistralModel):
    """Mistral's decoder with key convolutions."""

    config_class = MobaMistralConfig
    attention_class = MobaMistralAttention


class MobaMistralForCausalLM(KeyConvolutionForCausalLM, MistralForCausalLM):
    """Mistral's language model with key convolutions."""

    config_class = MobaMistralConfig
    model_class = MobaMistralModel
