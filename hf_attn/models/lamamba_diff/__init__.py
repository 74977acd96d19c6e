"""LaMamba-Diff: a diffusion U-Net of selective scans and window attention (arXiv 2408.02615), a model of diffusers."""

from __future__ import annotations

from hf_attn.models.lamamba_diff.modeling_lamamba_diff import VARIANTS, LaMambaDiffTransformer2DModel
from hf_attn.models.lamamba_diff.official import load_official
from hf_attn.models.lamamba_diff.pipeline_lamamba_diff import LaMambaDiffPipeline

__all__ = ["VARIANTS", "LaMambaDiffPipeline", "LaMambaDiffTransformer2DModel", "load_official"]
