"""Does something as soon as a module is imported, and does not import it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def when_imported(name: str, tell: Callable[[ModuleType], None]) -> None:
    """Call `tell(module)` once the module `name` has been imported: now if it has been already. Harmless to repeat."""
    # None there stands for a module whose import is forbidden.
    if (module := sys.modules.get(name)) is not None:
        tell(module)
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
            self._tell(sys.modules.get(fullname, module))  # a package may put another module in its place

        spec.loader.exec_module = run_and_tell
        return spec
