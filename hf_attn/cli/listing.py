"""`hf-attn list`: the mechanisms and what each supports."""

from __future__ import annotations

import json

import typer
from rich.padding import Padding
from rich.text import Text

import hf_attn
from hf_attn.cli.common import console
from hf_attn.integrations.transformers.repairs import TABLE
from hf_attn.models import CONVERSIONS

# What a user takes for granted of attention: said when it is missing.
_EXPECTED = ("train", "decode", "padding", "packing", "bidirectional", "triton")


def list_command(
    as_json: bool = typer.Option(False, "--json", help="Print the mechanisms as JSON."),
) -> None:
    """List the mechanisms with what each supports, the conversions and the repairs.

    Example: `hf-attn list`
    """
    rows = hf_attn.list_mechanisms()
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    for row in rows:
        held = [flag.replace("_", " ") for flag, holds in row["capabilities"].items() if holds]
        lacks = [flag for flag in _EXPECTED if not row["capabilities"][flag]]
        console.print(f"[bold]hf_attn_{row['name']}[/bold]", highlight=False)
        lines = [row["summary"], ", ".join(held) + (f"; no {', no '.join(lacks)}" if lacks else ""), row["source"]]
        for line, style in zip(lines, (None, None, "dim"), strict=True):
            console.print(Padding(Text(line, style=style or ""), (0, 0, 0, 2)))
    console.print(
        "\nWith new weights, hf_attn.convert(model, NAME): " + ", ".join(sorted(CONVERSIONS)), highlight=False
    )
    repairs = (f"{name} ({', '.join(types)})" for name, types in sorted(TABLE.items()))
    console.print(
        "Repairs of a host's own attention, hf_attn.apply(model, NAME): " + ", ".join(repairs), highlight=False
    )
