"""TransNormerLLM: a language model without softmax (TNL, arXiv 2405.17381)."""

from __future__ import annotations

from hf_attn.models.tnl.configuration_tnl import TnlConfig

__all__ = ["TnlConfig"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("Tnl"):
        from hf_attn.models.tnl import modeling_tnl

        if hasattr(modeling_tnl, name):
            return getattr(modeling_tnl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
