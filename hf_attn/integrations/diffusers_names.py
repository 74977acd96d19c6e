"""Models and pipelines of ours, found where diffusers looks for classes.

`DiffusionPipeline.from_pretrained` reads the names of the pipeline's class and of the components' libraries from
model_index.json. It asks the module `diffusers` for the first, and downloads a component only if its library is in a
table. So that `import hf_attn` is enough, and still does not import diffusers, both are told of us when they have been
imported; our classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PIPELINES = ("LaMambaDiffPipeline",)
_METHODS = ["save_pretrained", "from_pretrained"]


def install() -> None:
    """Tell diffusers now, or as soon as its modules are imported; harmless when repeated."""
    for name, tell in (("diffusers", _add_pipelines), ("diffusers.pipelines.pipeline_loading_utils", _add_library)):
        if name in sys.modules:
            tell(sys.modules[name])
        elif not any(isinstance(finder, _WhenImported) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported(name, tell))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls `tell` with it behind its own code; then it is gone."""

    def __init__(self, name: str, tell: Callable[[ModuleType], None]) -> None:
        self.name, self._tell = name, tell

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((found for f in others if (found := f.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:  # a spec alone, as availability checks ask for it, imports nothing
                sys.meta_path.remove(self)
            self._tell(sys.modules.get(fullname, module))  # diffusers puts another module in its place

        spec.loader.exec_module = run_and_tell
        return spec


def _add_library(module: ModuleType) -> None:
    table = getattr(module, "LOADABLE_CLASSES", None)
    if isinstance(table, dict):
        table.setdefault("hf_attn", {"ModelMixin": _METHODS})


def _add_pipelines(module: ModuleType) -> None:
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
