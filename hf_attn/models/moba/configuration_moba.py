"""Configs of the families with a key convolution: the host's config and three fields."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_attn.models.checkpoint import ThinFileConfig


@strict
class KeyConvolutionConfig(ThinFileConfig, PreTrainedConfig):
    """Fields of a key convolution.

    Args:
        kconv_width: taps, odd and >= 3; the published ones are 3 and 5. 0 builds the model without one.
        kconv_init: how a new weight is drawn: "default" as `nn.Conv1d` does, "zeros" so that keys stay as they are.
        kconv_layers: indices of the layers that have it; `None` for all.
    """

    kconv_width: int = 3
    kconv_init: str = "default"
    kconv_layers: list[int] | None = None

    thin_module = "hf_attn.models.moba"


@strict
class MobaLlamaConfig(KeyConvolutionConfig, LlamaConfig):
    """Llama with a key convolution."""

    model_type = "moba_llama"
    thin_classes = {"AutoModel": "MobaLlamaModel", "AutoModelForCausalLM": "MobaLlamaForCausalLM"}


@strict
class MobaQwen2Config(KeyConvolutionConfig, Qwen2Config):
    """Qwen2 with a key convolution."""

    model_type = "moba_qwen2"
    thin_classes = {"AutoModel": "MobaQwen2Model", "AutoModelForCausalLM": "MobaQwen2ForCausalLM"}


@strict
class MobaQwen3Config(KeyConvolutionConfig, Qwen3Config):
    """Qwen3 with a key convolution, after its k_norm."""

    model_type = "moba_qwen3"
    thin_classes = {"AutoModel": "MobaQwen3Model", "AutoModelForCausalLM": "MobaQwen3ForCausalLM"}


@strict
class MobaMistralConfig(KeyConvolutionConfig, MistralConfig):
    """Mistral with a key convolution."""

    model_type = "moba_mistral"
    thin_classes = {"AutoModel": "MobaMistralModel", "AutoModelForCausalLM": "MobaMistralForCausalLM"}
