"""What the families of vision backbones share. Importing this imports no model."""

from __future__ import annotations

from hf_attn.models.vision.configuration_vision import VisionConfig
from hf_attn.models.vision.official import OfficialNames

__all__ = ["OfficialNames", "VisionConfig"]
