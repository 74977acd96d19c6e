"""Titans: attention beside a memory that learns at test time (arXiv 2501.00663)."""

from __future__ import annotations

from hf_attn.models.titans.configuration_titans import TitansConfig
from hf_attn.nn.chunk_gated_memory import ChunkGatedMemory
from hf_attn.nn.neural_memory import NeuralMemory

__all__ = ["ChunkGatedMemory", "NeuralMemory", "TitansConfig"]


def __getattr__(name: str):
    """The model classes, imported when first asked for."""
    if name.startswith("Titans"):
        from hf_attn.models.titans import mixers, modeling_titans

        for module in (modeling_titans, mixers):
            if hasattr(module, name):
                return getattr(module, name)
    if name == "titans_mixer":
        from hf_attn.models.titans.mixers import titans_mixer

        return titans_mixer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
