"""DiNAT and NAT (arXiv 2209.15001, 2204.07143) without natten: transformers' configs and weights, on any device."""

from __future__ import annotations

from hf_attn.models.dinat.configuration_nat import NatConfig

_MODELS = (
    "DinatAttnBackbone",
    "DinatAttnForImageClassification",
    "DinatAttnModel",
    "NatAttnBackbone",
    "NatAttnForImageClassification",
    "NatAttnModel",
    "patch_dinat",
)
_CONVERSION = ("VARIANTS", "convert_state_dict")

__all__ = ["NatConfig", *_MODELS, *_CONVERSION]


def __getattr__(name: str):
    """The classes and the conversion, imported when first asked for."""
    if name in _MODELS:
        from hf_attn.models.dinat import modeling_dinat

        return getattr(modeling_dinat, name)
    if name in _CONVERSION:
        from hf_attn.models.dinat import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
