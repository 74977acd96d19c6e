"""Names of repositories on the Hub."""

from __future__ import annotations

from pathlib import Path


def hub_id(name: str | None) -> str | None:
    """`name` when it can be a Hub id, None for paths and files of this machine, which mean nothing elsewhere."""
    is_id = bool(name) and name.count("/") <= 1 and name[0] not in "./~" and not name.endswith(".gguf")
    return name if is_id and not Path(name).exists() else None
