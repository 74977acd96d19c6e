"""EMOv2: small vision backbones of inverted residual blocks with spanned window attention (arXiv 2412.06674)."""

from __future__ import annotations

from hf_attn.models.emov2.configuration_emov2 import EMOv2Config

__all__ = ["EMOv2Config"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("EMOv2"):
        from hf_attn.models.emov2 import modeling_emov2

        if hasattr(modeling_emov2, name):
            return getattr(modeling_emov2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
