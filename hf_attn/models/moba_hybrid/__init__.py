"""Sliding-window layers with positions and MoBA layers without, in turn (FlashMoBA, arXiv 2511.11571)."""

from __future__ import annotations

from hf_attn.models.moba_hybrid.configuration_moba_hybrid import MobaHybridConfig

__all__ = ["MobaHybridConfig", "MobaHybridForCausalLM", "MobaHybridModel"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name in __all__:
        from hf_attn.models.moba_hybrid import modeling_moba_hybrid

        return getattr(modeling_moba_hybrid, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
