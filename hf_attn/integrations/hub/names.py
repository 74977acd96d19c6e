"""Names of repositories on the Hub."""

from __future__ import annotations

from pathlib import Path


def hub_id(name: str | None) -> str | None:
    """`name` when it can be a Hub id, None for paths and files of this machine, which mean nothing elsewhere."""
    if not name or name.count("/") > 1 or name[0] in "./~" or name.endswith(".gguf"):
        return None
    return None if Path(name).exists() else name
