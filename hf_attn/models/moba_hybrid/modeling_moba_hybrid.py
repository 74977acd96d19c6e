"""The hybrid stack: Llama's layers, of two kinds in turn."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from hf_attn.models.key_convolution import (
    KeyConvolutionAttention,
    KeyConvolutionForCausalLM,
    KeyConvolutionModel,
)
from hf_attn.models.moba_hybrid.configuration_moba_hybrid import MobaHybridConfig


class MobaHybridAttention(KeyConvolutionAttention, LlamaAttention):
    """Attention with a window and rotary positions, or with neither."""


class MobaHybridModel(KeyConvolutionModel, Qwen2Model):
    """The decoder. Qwen2's already keeps one mask for windowed and one for global layers."""

    config_class = MobaHybridConfig
    attention_class = MobaHybridAttention

    def add_key_convolutions(self) -> None:
        """As for every family; projections lose Qwen2's biases, global layers their positions."""
        super().add_key_convolutions()
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.bias = None
            attention.rotary = kind == "sliding_attention" or self.config.global_positions


class MobaHybridForCausalLM(KeyConvolutionForCausalLM, Qwen2ForCausalLM):
    """The language model."""

    config_class = MobaHybridConfig
    model_class = MobaHybridModel
