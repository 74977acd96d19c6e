"""Does something as soon as PEFT is imported, and does not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport(MetaPathFinder):
    """Finds the package as the other finders do; whoever executes it also executes `action`."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package, self.action = package, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module
        return spec


def after_import(package: str, action: Callable[[], None]) -> None:
    """Call `action` once `package` has been imported: now if it has been already. Harmless when repeated."""
    if package in sys.modules:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(package, action))
