"""Models and pipelines of ours, found where diffusers looks for classes.

`DiffusionPipeline.from_pretrained` reads the names of the pipeline's class and of the components' libraries from
model_index.json. It asks the module `diffusers` for the first, and downloads a component only if its library is in a
table. So that `import hf_attn` is enough, and still does not import diffusers, both are told of us when they have been
imported; our classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hf_attn.importing import when_imported

PIPELINES = ("LaMambaDiffPipeline",)
_METHODS = ["save_pretrained", "from_pretrained"]


def install() -> None:
    """Tell diffusers now, or as soon as its modules are imported; harmless when repeated."""
    when_imported("diffusers", _add_pipelines)
    when_imported("diffusers.pipelines.pipeline_loading_utils", _add_library)


def _add_library(module: ModuleType) -> None:
    table = getattr(module, "LOADABLE_CLASSES", None)
    if isinstance(table, dict):
        table.setdefault("hf_attn", {"ModelMixin": _METHODS})


def _add_pipelines(module: ModuleType) -> None:
    base: Any = type(module)
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
