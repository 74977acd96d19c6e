"""Conversion "landmark": the host's weights, one more row in the embedding."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.checks import did_you_mean, require_int
from hf_attn.models.conversion import Conversion, carried_over
from hf_attn.models.landmark.configuration_landmark import LandmarkConfig, check, chunk_tokens

_MODULE = "hf_attn.models.landmark.modeling_landmark"
_PREFIX = "landmark_"
OPTIONS = [f.name.removeprefix(_PREFIX) for f in fields(LandmarkConfig) if f.name.startswith(_PREFIX)]


def configure(
    base: PreTrainedConfig, config_class: type[PreTrainedConfig], options: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model. `token_id` is the next free id unless given; `rewrite` makes its row.

    Raises ValueError for unknown options, and for a base that landmarks do not fit.
    """
    for name in options:
        if name not in OPTIONS:
            raise ValueError(
                f"convert(..., 'landmark') has no option {name!r}{did_you_mean(name, OPTIONS)}. Options: "
                f"{', '.join(OPTIONS)}."
            )
    token = options.get("token_id")
    if token is None:
        token = base.vocab_size
    require_int("token_id", token, 0)
    if token > base.vocab_size:
        raise ValueError(
            f"token_id={token} leaves a gap behind an embedding of {base.vocab_size} rows; use at most "
            f"{base.vocab_size}, or resize first: model.resize_token_embeddings(len(tokenizer))"
        )
    host = {**carried_over(base), "vocab_size": max(base.vocab_size, token + 1)}
    landmark = {_PREFIX + name: value for name, value in {**options, "token_id": token}.items()}
    config = config_class(**host, **landmark)
    check(config)
    chunk_tokens(config)
    return config


@torch.no_grad()
def rewrite(config: Any, name: str, weight: Tensor) -> Tensor:
    """Embedding and head with the landmark's row, the mean of the others; other weights as they are.

    Raises ValueError when the rows are quantised.
    """
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return weight
    if not weight.is_floating_point():
        raise ValueError(
            f"{name} is quantised ({weight.dtype}) and cannot get a row for the landmark; dequantise the model first, "
            "or load it with a quantization_config that leaves embeddings alone"
        )
    token, rows = config.landmark_token_id, weight.shape[0]
    grown = weight.new_empty(config.vocab_size, weight.shape[1])
    grown[:rows] = weight
    others = torch.arange(rows, device=weight.device) != token
    grown[token] = weight[others].float().mean(0).to(weight.dtype)
    return grown


CONVERSION = Conversion(
    name="landmark",
    families={
        "llama": (_MODULE, "LandmarkLlamaForCausalLM"),
        "qwen2": (_MODULE, "LandmarkQwen2ForCausalLM"),
        "qwen3": (_MODULE, "LandmarkQwen3ForCausalLM"),
        "mistral": (_MODULE, "LandmarkMistralForCausalLM"),
    },
    configure=configure,
    rewrite=rewrite,
)
