"""Public functions say what they take, give and refuse; `python -m tests.docstrings --list` names those that do not."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import hf_attn
from tests.docstrings import public_functions, shares

# Rooms that users import from: nothing may be missing there.
OPEN = ("call", "front", "grid", "mechanism", "mechanisms", "natten", "ops", "pattern")


def modules_with_all() -> list[str]:
    """Every module of the package that says what is public in it."""
    found = ["hf_attn"]
    for module in pkgutil.walk_packages(hf_attn.__path__, "hf_attn."):
        if module.ispkg or module.name == "hf_attn.natten" or module.name.startswith("hf_attn.mechanisms."):
            found.append(module.name)
    loaded = {name: importlib.import_module(name) for name in found if ".hfattn_sparse" not in name}
    return [name for name, module in loaded.items() if hasattr(module, "__all__")]


def test_public_functions_are_described_and_typed():
    functions = public_functions()
    full, typed = shares(functions)
    assert len(functions) > 900 and full >= 0.75 and typed >= 0.8, (len(functions), full, typed)
    described = [f for f in functions if f.name.split(".")[0] in OPEN]
    lacking = [(f.where, f.lacks) for f in described if f.lacks or not f.typed]
    assert len(lacking) <= 0.05 * len(described), lacking


@pytest.mark.parametrize("name", modules_with_all())
def test_every_public_name_has_a_docstring(name):
    """What the API reference shows: each name of `__all__` with a text of its own, not one inherited from its base."""
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} says nothing about itself"
    assert len(set(module.__all__)) == len(module.__all__), f"{name}.__all__ names something twice"
    for public in module.__all__:
        thing = getattr(module, public)
        if callable(thing):
            own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
            assert (own or "").strip(), f"{name}.{public} has no docstring"
