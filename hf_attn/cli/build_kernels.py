"""`hf-attn build-kernels`: the kernels of a source checkout as repositories for the Hub."""

from __future__ import annotations

from pathlib import Path

import typer

from hf_attn.checks import did_you_mean
from hf_attn.cli.common import console, one_clear_line


def build_kernels(
    names: list[str] = typer.Argument(None, metavar="[NAME]...", help="Folders of kernels/; default all of them."),
    output: Path = typer.Option(Path("build"), "--output", help="Each kernel becomes a folder in here."),
) -> None:
    """Build kernels for the Hub: one variant a backend, sources only, no compiler.

    Example: `hf-attn build-kernels hfattn-sparse --output build`, then in Python
    `kernels.get_local_kernel(Path("build/hfattn-sparse"))`
    """
    from hf_attn.integrations.hub.kernels import build_kernel, kernel_folders, kernel_sources

    with one_clear_line():
        folders = kernel_folders(kernel_sources())
        for name in names or []:
            if name not in folders:
                raise ValueError(f"no kernel is called {name!r}{did_you_mean(name, list(folders))}")
        for name in names or folders:
            variants = build_kernel(folders[name], output / name)
            console.print(f"{output / name}: {', '.join(path.name for path in variants)}", highlight=False)
