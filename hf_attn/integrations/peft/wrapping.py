"""Weights of a base model below the layers that PEFT puts around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def base_weight(model: nn.Module, name: str, adapter: str | None = None) -> tuple[Tensor, bool]:
    """The base's weight called `name`, and whether `adapter` holds a trained copy of it (`modules_to_save`).

    Args:
        model: the model inside a PeftModel, or any other.
        name: as in the model before PEFT.

    `[out, in]` of a linear layer.
    """
    module: Any = model
    saved = False
    for part in name.split("."):
        inner = _inside(module, part)
        while inner is not None:
            saved |= adapter in getattr(module, "modules_to_save", ())
            module, inner = inner, _inside(inner, part)
        module = getattr(module, part)
    return module, saved


def _inside(module: Any, part: str) -> nn.Module | None:
    """The layer that a PEFT layer wraps, None for a layer that is no wrapper."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return module.original_module
    if hasattr(module, "token_adapter"):
        return module.token_adapter.base_layer
    return module.base_layer if hasattr(module, "base_layer") and not part.startswith("lora_") else None
