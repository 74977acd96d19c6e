"""Llama, Qwen2, Qwen3 and Mistral with landmark attention (arXiv 2305.16300)."""

from __future__ import annotations

from hf_attn.models.landmark.configuration_landmark import (
    LandmarkLlamaConfig,
    LandmarkMistralConfig,
    LandmarkQwen2Config,
    LandmarkQwen3Config,
)

__all__ = ["LandmarkLlamaConfig", "LandmarkMistralConfig", "LandmarkQwen2Config", "LandmarkQwen3Config"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("Landmark"):
        from hf_attn.models.landmark import modeling_landmark

        if hasattr(modeling_landmark, name):
            return getattr(modeling_landmark, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
