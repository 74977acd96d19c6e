"""Host models whose attention code is their own and at fault: `hf_attn.apply` mends them module by module.

A repair is one file of this folder with `install(model, **options) -> undo`, where `undo(model)` finds what to restore
by itself: it is kept in the model and goes along when that is copied or pickled. A repair changes a model in this
process only: weights, config and checkpoints stay the host's own. Repairs and a mechanism may be on one model at the
same time (MiniMax: "lightning" for its linear layers, "moba" for the others).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from hf_attn.mechanism import mechanism_names

# Name -> model type -> file of this folder.
TABLE: dict[str, dict[str, str]] = {
    "lightning": {"minimax": "minimax"},
    "neighborhood": {"dinat": "dinat", "nat": "dinat", "oneformer": "oneformer"},
}
Undo = Callable[[nn.Module], None]
# Where a model keeps its repairs: name -> (options, undo).
_KEY = "_hf_attn_repairs"


def known(name: str, model: PreTrainedModel) -> bool:
    """Is `name` a repair of this model's type? Raises ValueError for the type when it is a repair of others only."""
    types = TABLE.get(name, {})
    if model.config.model_type in types:
        return True
    if types and name not in mechanism_names():
        raise ValueError(
            f"{name!r} repairs models of type {', '.join(types)}; {type(model).__name__} is of type "
            f"{model.config.model_type!r} and has nothing to repair"
        )
    return False


def install(name: str, model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Put a repair in; one that is there makes room for it, and stays when the new options are refused."""
    file = importlib.import_module(f"{__name__}.{TABLE[name][model.config.model_type]}")
    done = dict(model.__dict__.get(_KEY, {}))
    before = done.pop(name, None)
    if before is not None:
        before[1](model)
    try:
        done[name] = options, file.install(model, **options)
    except Exception:
        if before is not None:
            file.install(model, **before[0])
        raise
    model.__dict__[_KEY] = done


def undo(model: PreTrainedModel) -> None:
    """Take every repair out, the last one first."""
    for _, restore in reversed(model.__dict__.pop(_KEY, {}).values()):
        restore(model)


def installed(model: PreTrainedModel) -> list[str]:
    """Names of the repairs in a model."""
    return list(model.__dict__.get(_KEY, {}))


def become(modules: list[nn.Module], mended: type[nn.Module]) -> Undo:
    """Let modules of one class be of class `mended`, a subclass of it with the same weights; returns what undoes it.

    The class is the one thing of a module that deepcopy, hooks, PEFT and `isinstance` all follow.
    """
    original = type(modules[0]) if modules else mended
    for module in modules:
        module.__class__ = mended
    return partial(_restore_classes, mended, original)


def together(*steps: Undo) -> Undo:
    """One undo that takes several steps back, the last one first."""
    return partial(_take_back, steps)


def _restore_classes(mended: type[nn.Module], original: type[nn.Module], root: nn.Module) -> None:
    for module in root.modules():
        if type(module) is mended:
            module.__class__ = original


def _take_back(steps: tuple[Undo, ...], root: nn.Module) -> None:
    for step in reversed(steps):
        step(root)
