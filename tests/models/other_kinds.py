"""A conversion for the tests: classifiers, base models and a diffusers transformer, each with one new layer."""

from __future__ import annotations

import inspect

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_attn.models.checkpoint import ThinFileConfig
from hf_attn.models.conversion import Conversion, carried_over


class Extra:
    """One new layer, `extra`, that scales what the model returns."""

    def add_extra(self, width: int) -> None:
        self.extra = nn.Linear(width, width, bias=False)


class ExtraViTConfig(ThinFileConfig, ViTConfig):
    model_type = "extra_vit"
    thin_module = "tests.models.other_kinds"
    thin_classes = {"AutoModelForImageClassification": "ExtraViTForImageClassification", "AutoModel": "ExtraViTModel"}
    width: int = 2


class ExtraViTModel(Extra, ViTModel):
    config_class = ExtraViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.add_extra(config.width)


class ExtraViTForImageClassification(Extra, ViTForImageClassification):
    config_class = ExtraViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.add_extra(config.width)


class ExtraLlamaConfig(LlamaConfig):
    model_type = "extra_llama"
    width: int = 2


class ExtraLlamaForCausalLM(Extra, LlamaForCausalLM):
    config_class = ExtraLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.add_extra(config.width)


class Standalone(nn.Module):
    """Stands for a class that does not inherit from the host's."""


class ExtraDiT(DiTTransformer2DModel):
    @register_to_config
    def __init__(self, width: int = 2, num_layers: int = 2, num_attention_heads: int = 2, attention_head_dim: int = 8,
                 in_channels: int = 4, sample_size: int = 8, num_embeds_ada_norm: int = 10):  # fmt: skip
        super().__init__(
            num_layers=num_layers, num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim,
            in_channels=in_channels, sample_size=sample_size, num_embeds_ada_norm=num_embeds_ada_norm,
        )  # fmt: skip
        self.extra = nn.Linear(width, width)


def configure(base, ours, options):
    if options.get("width", 2) < 1:
        raise ValueError(f"width must be >= 1, got {options['width']}")
    if isinstance(base, dict):
        known = inspect.signature(ours.__init__).parameters
        return {**{key: value for key, value in base.items() if key in known}, **options}
    return ours(**carried_over(base), **options)


def prepare(load, options):
    """Takes the new weight from the base when asked to."""
    options = dict(options)
    if not options.pop("look", False):
        return options, {}
    model = load()
    assert not model.training
    first = next(p for p in model.parameters() if p.dim() > 1)
    return options, {"extra.weight": torch.full((2, 2), float(first.detach().double().sum()))}


_HERE = "tests.models.other_kinds"
CONVERSION = Conversion(
    name="extra",
    families={
        "vit": [(_HERE, "ExtraViTForImageClassification"), (_HERE, "ExtraViTModel")],
        "llama": [(_HERE, "ExtraLlamaForCausalLM"), (_HERE, "Standalone", LlamaForSequenceClassification.__name__)],
        "DiTTransformer2DModel": (_HERE, "ExtraDiT"),
    },
    configure=configure,
    prepare=prepare,
)


def double_embeddings(config, name, weight):
    return weight * 2 if name.endswith("embed_tokens.weight") else weight


REWRITING = Conversion("rewriting", CONVERSION.families, configure, rewrite=double_embeddings)
