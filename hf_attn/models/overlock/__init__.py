"""OverLoCK: a ConvNet whose dynamic kernels read an overview of the image first (arXiv 2502.20087)."""

from __future__ import annotations

from hf_attn.models.overlock.configuration_overlock import OverlockConfig

__all__ = ["OverlockConfig"]


def __getattr__(name: str):
    """The model classes and the plug-in block, imported when first asked for."""
    if name.startswith("Overlock"):
        from hf_attn.models.overlock import modeling_overlock

        if hasattr(modeling_overlock, name):
            return getattr(modeling_overlock, name)
    if name == "ContMixBlock":
        from hf_attn.models.overlock.contmix import ContMixBlock

        return ContMixBlock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
