"""`hf-attn bench bars`: every speed that the project promises, measured here."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from hf_attn.bench.bars import chosen, measure
from hf_attn.bench.record import git_version, hardware, version_of
from hf_attn.bench.timing import machine_load
from hf_attn.cli.bench_common import WIDE
from hf_attn.cli.common import console, one_clear_line, progress_line


def bars(
    only: list[str] = typer.Option([], "--only", help="Bars whose name starts so; may be repeated."),
    runs: int = typer.Option(2, min=1, help="Runs of every command; the worst counts."),
    show: bool = typer.Option(False, "--list", help="List the bars and their commands, and measure nothing."),
    output: Path = typer.Option(None, "--output", help="Write the table to this text file as well."),
) -> None:
    """Measure all speed bars on this CPU, one table: the bar, its figures, and whether it holds with 10 % to spare.

    Example: `hf-attn bench bars --only psa --only linear`
    """
    with one_clear_line():
        wanted = chosen(only)
        head = f"{hardware('cpu')}, torch {version_of('torch')}, hf-attn {git_version()}, {machine_load()}"
        table = Table(box=None, pad_edge=False, title=head, title_justify="left")
        for name in ("bar", "against", "asked", "measured", "result", "command"):
            table.add_column(name, overflow="fold")
        if show:
            for bar in wanted:
                table.add_row(bar.name, bar.what, _asked(bar.bound, bar.most), "", "", bar.line)
        else:
            with progress_line("bars") as progress:
                for done, found in enumerate(measure(wanted, runs), 1):
                    bar, values = found.bar, " ".join(f"{value:g}" for value in found.values)
                    table.add_row(bar.name, bar.what, _asked(bar.bound, bar.most), values, found.verdict, bar.line)
                    progress(done, len(wanted))
        Console(width=max(console.width, WIDE), file=console.file).print(table)
        console.print(machine_load(), highlight=False)
        if output is not None:
            with output.open("w") as stream:
                Console(width=WIDE, file=stream).print(table)


def _asked(bound: float, most: bool) -> str:
    return f"{'<=' if most else '>='} {bound:g}"
