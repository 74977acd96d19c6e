"""Llama, Qwen2, Qwen3, Mistral and ViT with Mixture-of-Head attention (MoH, arXiv 2410.11842)."""

from __future__ import annotations

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    """The model classes, imported when first asked for: a config alone should not load four modelling files."""
    if name.startswith("MoH"):
        modeling = importlib.import_module(f"{__name__}.modeling_moh{'_vit' if name.startswith('MoHViT') else ''}")
        if hasattr(modeling, name):
            return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
