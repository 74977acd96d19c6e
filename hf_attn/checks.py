"""Checks of user input that every room shares. Imports nothing of the package."""

from __future__ import annotations

import difflib
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import SymInt


def did_you_mean(name: str, valid: list[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest valid name, or nothing."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer >= minimum (bools and floats are refused).

    A length that a compiler keeps symbolic counts as an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int | SymInt) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def require_one_of(name: str, value: Any, allowed: tuple[str | bool | None, ...]) -> None:
    """Raise ValueError unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def require_share(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError when `folder` is a file or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is never overwritten; choose another folder or remove it")


def require_hosts(*names: str) -> None:
    """Raise ImportError when an installed package is older than this package's metadata asks for.

    Reads metadata only, imports nothing. `pip install --no-deps` and old environments get here; without the check they
    would see an import error deep inside.
    """
    try:
        wanted = metadata.requires("hf-attn") or []
    except metadata.PackageNotFoundError:  # a source tree on the path: nothing says what it needs
        return
    for line in wanted:
        found = re.match(r"([A-Za-z0-9_-]+)>=(\d+)\.(\d+)", line.replace(" ", ""))
        if found is None or found[1] not in names:
            continue
        floor = int(found[2]), int(found[3])
        try:
            version = metadata.version(found[1])
        except metadata.PackageNotFoundError:
            raise ImportError(f"hf-attn needs {found[1]} >= {found[2]}.{found[3]}; pip install {found[1]}") from None
        have = re.match(r"(\d+)\.(\d+)", version)
        if have is not None and (int(have[1]), int(have[2])) < floor:
            raise ImportError(
                f"hf-attn needs {found[1]} >= {found[2]}.{found[3]}, found {version}; pip install --upgrade {found[1]}"
            )
