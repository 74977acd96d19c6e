"""`hf-attn list`: the mechanisms and what each supports."""

from __future__ import annotations

import json

import typer
from rich.table import Table

import hf_attn
from hf_attn.cli.common import console


def list_command(
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """List the mechanisms and what each supports.

    Example: `hf-attn list`
    """
    rows = hf_attn.list_mechanisms()
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(title="attn_implementation=", title_justify="left")
    table.add_column("string", style="bold", no_wrap=True)
    table.add_column("what it does")
    flags = list(rows[0]["capabilities"])
    for flag in flags:
        table.add_column(flag.replace("_", " "), justify="center")
    for row in rows:
        marks = ["yes" if row["capabilities"][flag] else "-" for flag in flags]
        table.add_row(f"hf_attn_{row['name']}", f"{row['summary']}\n[dim]{row['source']}[/dim]", *marks)
    console.print(table)
