"""PATNet: a vision backbone of partial convolutions and partial attention (arXiv 2503.03148)."""

from __future__ import annotations

from hf_attn.models.patnet.configuration_patnet import PatNetConfig

__all__ = ["PatNetConfig"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("PatNet"):
        from hf_attn.models.patnet import modeling_patnet

        if hasattr(modeling_patnet, name):
            return getattr(modeling_patnet, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
