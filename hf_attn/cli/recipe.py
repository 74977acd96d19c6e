"""`hf-attn recipe NAME`: run a recipe of the source tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from hf_attn.checks import did_you_mean
from hf_attn.cli.common import console, one_clear_line

# Beside the package in a source tree or an editable install; wheels do not carry the recipes, which are there to edit.
FOLDER = Path(__file__).resolve().parents[2] / "recipes"


def recipe(
    context: typer.Context,
    name: str = typer.Argument(None, metavar="[NAME]", help="A recipe; without one, list them."),
    smoke: bool = typer.Option(False, "--smoke", help="Tiny sizes: ends in seconds on a CPU."),
) -> None:
    """Run a training recipe; further arguments go to its script (`--config`, `--output`).

    Example: `hf-attn recipe moba_pretrain --smoke`
    """
    with one_clear_line():
        names = sorted(script.parent.name for script in FOLDER.glob("*/train.py"))
        if not names:
            raise ValueError(
                f"no recipes in {FOLDER}: this hf-attn was installed from a wheel, and recipes are part of the source "
                "tree. Clone the repository and run `python recipes/NAME/train.py` there."
            )
        if name is not None and name not in names:
            raise ValueError(f"unknown recipe {name!r}{did_you_mean(name, names)}. Recipes: {', '.join(names)}.")
    if name is None:
        for known in names:
            summary = (FOLDER / known / "README.md").read_text().splitlines()[2]
            console.print(f"[bold]{known}[/bold]  {summary}", highlight=False, soft_wrap=True)
        return
    command = [sys.executable, str(FOLDER / name / "train.py"), *(["--smoke"] if smoke else []), *context.args]
    raise typer.Exit(subprocess.run(command).returncode)
