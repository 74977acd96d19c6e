"""Tiny models with a key convolution, weights spread so that a wrong key shows."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attn
from tests.integrations.transformers.tiny import SIZES

HOSTS = ["llama", "qwen2", "qwen3", "mistral"]
FAMILIES = [f"moba_{host}" for host in HOSTS] + ["moba_hybrid"]
# Sparse from the first token: 2 blocks of 4 keys.
MOBA = {"block_size": 4, "top_k": 2, "decode": "moba", "min_seq_len": 0}
EXTRA = {
    "mistral": {"sliding_window": None},
    "moba_mistral": {"sliding_window": None},
    "moba_hybrid": {"sliding_window": 6, "num_hidden_layers": 4},
}


def spread(model):
    """Large random weights: fresh ones make every output nearly equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6 if "embed" in name or "k_conv1d" in name else 0.25, generator=generator)
    return model.eval()


def host(model_type: str, **options):
    """A dense model of the host."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **EXTRA.get(model_type, {}), **options})
    return spread(AutoModelForCausalLM.from_config(config))


def family(model_type: str, moba: bool = True, **options):
    """A model of ours, with MoBA over the convolved keys or dense ones."""
    fields = {**SIZES, **EXTRA.get(model_type, {}), "kconv_width": 3, **options}
    model = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)))
    if moba:
        hf_attn.apply(model, "moba", **MOBA)
    return model
