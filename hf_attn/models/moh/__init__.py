"""Llama, Qwen2, Qwen3 and Mistral with Mixture-of-Head attention (MoH, arXiv 2410.11842)."""

from __future__ import annotations

from hf_attn.models.moh.configuration_moh import (
    MoHLlamaConfig,
    MoHMistralConfig,
    MoHQwen2Config,
    MoHQwen3Config,
    activated_share,
)

__all__ = ["MoHLlamaConfig", "MoHMistralConfig", "MoHQwen2Config", "MoHQwen3Config", "activated_share"]


def __getattr__(name: str):
    """The model classes, imported when first asked for: a config alone should not load four modelling files."""
    if name.startswith("MoH"):
        from hf_attn.models.moh import modeling_moh

        if hasattr(modeling_moh, name):
            return getattr(modeling_moh, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
