"""What transformers does to a checkpoint while it loads it; this file is the only one that knows the names for it."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import transformers
from torch import nn


def host_on_meta(host: str, config: Any) -> nn.Module:
    """A model of transformers' class `host` without memory for its weights."""
    with torch.device("meta"):
        return getattr(transformers, host)(copy.deepcopy(config))


def renames_weights(model: nn.Module) -> bool:
    """Does transformers rename or merge weights when it loads this model?

    It does so by class and model type, for its own classes only: a class of ours would find none of the renamed ones.
    """
    try:
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping
    except (ImportError, AttributeError):
        return False
    return bool(mapping(model, add_legacy=False))
