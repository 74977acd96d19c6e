"""`hf-attn`: one file a command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; a missing typer or rich ends in one line instead of a traceback."""
    try:
        from hf_attn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"hf-attn: the command line needs {error.name}: pip install {error.name}")
    app()
