"""Configs of the families with a memory branch: the host's config and the fields of the memory."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_attn.models.checkpoint import ThinFileConfig


@strict
class TitansBranchConfig(ThinFileConfig, PreTrainedConfig):
    """Fields of the memory branches; see `hf_attn.nn.neural_memory.NeuralMemory` for the memory itself.

    Args:
        titans_layers: indices of the layers that have one; None for all.
        titans_num_heads: memories of a layer; None for one for 64 channels.
        titans_depth, titans_inner_size: matrices of a memory, and the width between them (None: 4 times a head's).
        titans_chunk_size, titans_theta_max: tokens of a chunk, and the largest step; their product stays below 16.
        titans_conv_kernel: taps of the convolutions; 0 for none.
        titans_max_inner_grad_norm: bound of a token's inner gradient; None for none.
        titans_freeze_memory: read the memories, write nothing.
    """

    titans_layers: list[int] | None = None
    titans_num_heads: int | None = None
    titans_depth: int = 2
    titans_inner_size: int | None = None
    titans_chunk_size: int = 64
    titans_theta_max: float = 0.1
    titans_conv_kernel: int = 4
    titans_max_inner_grad_norm: float | None = None
    titans_freeze_memory: bool = False

    thin_module = "hf_attn.models.titans_branch"

    def memory_layers(self) -> list[int]:
        """Indices of the layers with a memory; raises ValueError for layers that do not exist."""
        count = self.num_hidden_layers
        layers = list(range(count)) if self.titans_layers is None else self.titans_layers
        for index in layers:
            if not 0 <= index < count:
                raise ValueError(f"titans_layers names layer {index}, but there are {count} layers (0 to {count - 1})")
        return layers


@strict
class TitansLlamaConfig(TitansBranchConfig, LlamaConfig):
    """Llama with memory branches."""

    model_type = "titans_llama"
    thin_classes = {"AutoModel": "TitansLlamaModel", "AutoModelForCausalLM": "TitansLlamaForCausalLM"}


@strict
class TitansQwen2Config(TitansBranchConfig, Qwen2Config):
    """Qwen2 with memory branches."""

    model_type = "titans_qwen2"
    thin_classes = {"AutoModel": "TitansQwen2Model", "AutoModelForCausalLM": "TitansQwen2ForCausalLM"}


@strict
class TitansQwen3Config(TitansBranchConfig, Qwen3Config):
    """Qwen3 with memory branches."""

    model_type = "titans_qwen3"
    thin_classes = {"AutoModel": "TitansQwen3Model", "AutoModelForCausalLM": "TitansQwen3ForCausalLM"}


@strict
class TitansMistralConfig(TitansBranchConfig, MistralConfig):
    """Mistral with memory branches."""

    model_type = "titans_mistral"
    thin_classes = {"AutoModel": "TitansMistralModel", "AutoModelForCausalLM": "TitansMistralForCausalLM"}
