"""Llama, Qwen2, Qwen3 and Mistral with a key convolution (FlashMoBA, arXiv 2511.11571, appendix C)."""

from __future__ import annotations

from hf_attn.models.moba.configuration_moba import (
    MobaLlamaConfig,
    MobaMistralConfig,
    MobaQwen2Config,
    MobaQwen3Config,
)

__all__ = ["MobaLlamaConfig", "MobaMistralConfig", "MobaQwen2Config", "MobaQwen3Config"]


def __getattr__(name: str):
    """The model classes, imported when first asked for: a config alone should not load four modelling files."""
    if name.startswith("Moba"):
        from hf_attn.models.moba import modeling_moba

        if hasattr(modeling_moba, name):
            return getattr(modeling_moba, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
