"""Pipelines of ours, found where diffusers looks for a pipeline's class: among its own names.

`DiffusionPipeline.from_pretrained` reads a class name from model_index.json and asks the module `diffusers` for it. So
that `import hf_attn` is enough, and still does not import diffusers, the names are added when diffusers has been
imported, and a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

PIPELINES = ("LaMambaDiffPipeline",)


def install() -> None:
    """Add the names now, or as soon as diffusers is imported; harmless when repeated."""
    module = sys.modules.get("diffusers")
    if module is not None:
        _add(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds diffusers as the other finders do, and adds the names behind its own code; then it is gone."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("diffusers")
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_add(module: ModuleType) -> None:
            run(module)
            _add(sys.modules["diffusers"])  # diffusers puts another module in its place

        spec.loader.exec_module = run_and_add
        return spec


def _add(module: ModuleType) -> None:
    base = type(module)
    if getattr(base, "hf_attn_names", False):
        return

    class Module(base):
        hf_attn_names = True

        def __getattr__(self, name: str) -> Any:
            if name in PIPELINES:
                return getattr(importlib.import_module("hf_attn"), name)
            if hasattr(base, "__getattr__"):
                return super().__getattr__(name)
            raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    module.__class__ = Module
