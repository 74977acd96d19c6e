"""Conversion "titans": a memory beside the attention of some layers, which changes nothing before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.checks import did_you_mean
from hf_attn.models.conversion import Conversion, carried_over
from hf_attn.models.titans_branch.configuration_titans_branch import TitansLlamaConfig
from hf_attn.models.titans_branch.modeling_titans_branch import TitansBranch

_MODULE = "hf_attn.models.titans_branch.modeling_titans_branch"
_OPTIONS = (
    "layers",
    "num_heads",
    "depth",
    "inner_size",
    "chunk_size",
    "theta_max",
    "conv_kernel",
    "max_inner_grad_norm",
    "freeze_memory",
)


def configure(
    base: PreTrainedConfig, config_class: type[PreTrainedConfig], options: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model; an option `x` is the field `titans_x`."""
    config = config_class(**carried_over(base), **_fields(options))
    config.memory_layers()
    return config


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(
                f"unknown option {name!r}{did_you_mean(name, list(_OPTIONS))} of conversion 'titans'; options: "
                f"{', '.join(_OPTIONS)}"
            )
    return {f"titans_{name}": value for name, value in options.items()}


def prepare(load: Callable[[], nn.Module], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """New memories, drawn as in a model from scratch; raises ValueError for sizes that do not fit the base model."""
    base = load().config
    sizes = {"hidden_size": base.hidden_size, "num_hidden_layers": base.num_hidden_layers}
    config = TitansLlamaConfig(**sizes, rms_norm_eps=base.rms_norm_eps, **_fields(options))
    weights = {}
    for index in config.memory_layers():
        for name, value in TitansBranch(config).state_dict().items():
            weights[f"model.layers.{index}.self_attn.titans.{name}"] = value
    return options, weights


CONVERSION = Conversion(
    name="titans",
    families={
        "llama": (_MODULE, "TitansLlamaForCausalLM"),
        "qwen2": (_MODULE, "TitansQwen2ForCausalLM"),
        "qwen3": (_MODULE, "TitansQwen3ForCausalLM"),
        "mistral": (_MODULE, "TitansMistralForCausalLM"),
    },
    configure=configure,
    prepare=prepare,
)
