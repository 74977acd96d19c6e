"""What transformers does to a checkpoint while it loads it; this file is the only one that knows the names for it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers


def renames_weights(host: str, config: Any) -> bool:
    """Does transformers rename or merge weights when it loads class `host`?

    It does so by class and model type, for its own classes only: a class of ours would find none of the renamed ones.
    """
    try:
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping
    except (ImportError, AttributeError):
        return False
    with torch.device("meta"):
        model = getattr(transformers, host)(config)
    return bool(mapping(model, add_legacy=False))
