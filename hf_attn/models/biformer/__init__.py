"""BiFormer: a vision backbone with bi-level routing attention (arXiv 2303.08810)."""

from __future__ import annotations

from hf_attn.models.biformer.configuration_biformer import BiFormerConfig

__all__ = ["BiFormerConfig"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("BiFormer"):
        from hf_attn.models.biformer import modeling_biformer

        if hasattr(modeling_biformer, name):
            return getattr(modeling_biformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
