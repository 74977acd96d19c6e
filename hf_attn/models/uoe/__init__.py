"""Llama, Qwen2, Qwen3 and Mistral as unions of experts (UoE, arXiv 2503.02495)."""

from __future__ import annotations

from hf_attn.models.uoe.configuration_uoe import UoeLlamaConfig, UoeMistralConfig, UoeQwen2Config, UoeQwen3Config

__all__ = ["UoeLlamaConfig", "UoeMistralConfig", "UoeQwen2Config", "UoeQwen3Config"]


def __getattr__(name: str):
    """The model classes and what works on models, imported when first asked for."""
    if name in ("merge_to_dense", "order_neurons"):
        from hf_attn.models.uoe import conversion

        return getattr(conversion, name)
    if name == "UoeCache":
        from hf_attn.integrations.transformers.selected import UoeCache

        return UoeCache
    if name.startswith("Uoe"):
        from hf_attn.models.uoe import modeling_uoe

        if hasattr(modeling_uoe, name):
            return getattr(modeling_uoe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
