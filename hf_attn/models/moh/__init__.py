"""Llama, Qwen2, Qwen3, Mistral and ViT with Mixture-of-Head attention (MoH, arXiv 2410.11842)."""

from __future__ import annotations

from hf_attn.models.moh.configuration_moh import (
    MoHLlamaConfig,
    MoHMistralConfig,
    MoHQwen2Config,
    MoHQwen3Config,
    MoHViTConfig,
    activated_share,
)

__all__ = [
    "MoHLlamaConfig",
    "MoHMistralConfig",
    "MoHQwen2Config",
    "MoHQwen3Config",
    "MoHViTConfig",
    "activated_share",
]


def __getattr__(name: str):
    """The model classes, imported when first asked for: a config alone should not load four modelling files."""
    if name.startswith("MoHViT"):
        from hf_attn.models.moh import modeling_moh_vit as modeling
    elif name.startswith("MoH"):
        from hf_attn.models.moh import modeling_moh as modeling
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if hasattr(modeling, name):
        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
