"""Host models whose attention code is their own and at fault: `hf_attn.apply` mends them module by module.

A repair is one file of this folder with `install(model, **options) -> undo`. It changes a model in this process only:
weights, config and checkpoints stay the host's own. Repairs and a mechanism may be on one model at the same time
(MiniMax: "lightning" for its linear layers, "moba" for the others).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from hf_attn.mechanism import mechanism_names

# Name -> model type -> file of this folder.
TABLE: dict[str, dict[str, str]] = {
    "lightning": {"minimax": "minimax"},
    "neighborhood": {"dinat": "dinat", "nat": "dinat", "oneformer": "oneformer"},
}
_INSTALLED: WeakKeyDictionary[PreTrainedModel, dict[str, Callable[[], None]]] = WeakKeyDictionary()


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
    """Put a repair in; one that is there is taken out first, so the last options count."""
    file = importlib.import_module(f"{__name__}.{TABLE[name][model.config.model_type]}")
    done = _INSTALLED.setdefault(model, {})
    before = done.pop(name, None)
    if before is not None:
        before()
    done[name] = file.install(model, **options)


def undo(model: PreTrainedModel) -> None:
    """Take every repair out, the last one first."""
    for restore in reversed(_INSTALLED.pop(model, {}).values()):
        restore()


def installed(model: PreTrainedModel) -> list[str]:
    """Names of the repairs in a model."""
    return list(_INSTALLED.get(model, {}))


def become(modules: list[nn.Module], mended: type[nn.Module]) -> Callable[[], None]:
    """Let modules be of class `mended`, a subclass of theirs with the same weights; returns what undoes it.

    The class is the one thing of a module that deepcopy, hooks, PEFT and `isinstance` all follow.
    """
    before = [(module, module.__class__) for module in modules]
    for module in modules:
        module.__class__ = mended

    def restore() -> None:
        for module, original in before:
            module.__class__ = original

    return restore
