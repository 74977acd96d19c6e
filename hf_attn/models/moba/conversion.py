"""Conversion "moba": Mixture of Block Attention with a key convolution."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hf_attn.mechanism import MechanismConfig, parse_config
from hf_attn.models.conversion import Conversion, carried_over
from hf_attn.nn.key_convolution import check_width

_MODULE = "hf_attn.models.moba.modeling_moba"


def configure(
    base: PreTrainedConfig, config_class: type[PreTrainedConfig], options: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model; the convolution goes into the layers that will run MoBA.

    Raises ValueError for unknown options.
    """
    options = dict(options)
    width = options.pop("kconv_width", 3)
    if width == 0:
        raise ValueError(
            "kconv_width=0 adds no weights, so there is nothing to convert; use hf_attn.apply(model, 'moba')"
        )
    check_width(width)
    mechanism = {"mechanism": "moba", **options}
    parsed = parse_config(mechanism)[1]
    parsed.check_layer_count(base.num_hidden_layers)
    layers = [i for i in range(base.num_hidden_layers) if _runs_moba(base, parsed, i)]
    if not layers:
        raise ValueError(
            "no layer of this model would run MoBA: all of them have a sliding window "
            f"({getattr(base, 'sliding_window', None)}) or are left dense by layers=; load it with "
            "sliding_window=None, or name fewer layers"
        )
    fields = {
        "kconv_width": width,
        "kconv_init": "zeros",
        "kconv_layers": None if len(layers) == base.num_hidden_layers else layers,
    }
    config = config_class(**carried_over(base), **fields)
    config.hf_attn = mechanism
    return config


def _runs_moba(base: PreTrainedConfig, parsed: MechanismConfig, index: int) -> bool:
    if parsed.for_layer(index, base.num_hidden_layers) is None:
        return False
    if getattr(base, "layer_types", None):
        return base.layer_types[index] != "sliding_attention"
    return getattr(base, "sliding_window", None) is None


CONVERSION = Conversion(
    name="moba",
    families={
        "llama": (_MODULE, "MobaLlamaForCausalLM"),
        "qwen2": (_MODULE, "MobaQwen2ForCausalLM"),
        "qwen3": (_MODULE, "MobaQwen3ForCausalLM"),
        "mistral": (_MODULE, "MobaMistralForCausalLM"),
    },
    configure=configure,
)
