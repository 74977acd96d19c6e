"""Llama, Qwen2, Qwen3 and Mistral with a memory beside the attention of some layers (after arXiv 2501.00663)."""

from __future__ import annotations

from hf_attn.models.titans_branch.configuration_titans_branch import (
    TitansLlamaConfig,
    TitansMistralConfig,
    TitansQwen2Config,
    TitansQwen3Config,
)

__all__ = ["TitansLlamaConfig", "TitansMistralConfig", "TitansQwen2Config", "TitansQwen3Config"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("Titans"):
        from hf_attn.models.titans_branch import modeling_titans_branch

        if hasattr(modeling_titans_branch, name):
            return getattr(modeling_titans_branch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
