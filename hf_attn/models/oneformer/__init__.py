"""OneFormer (arXiv 2211.06220) complete: DiNAT backbones, fused attention, no scipy, training as published."""

from __future__ import annotations

__all__ = ["OneFormerAttnForUniversalSegmentation", "OneFormerAttnModel", "patch_oneformer"]


def __getattr__(name: str):
    """The classes, imported when first asked for."""
    if name in __all__:
        from hf_attn.models.oneformer import modeling_oneformer

        return getattr(modeling_oneformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
