"""`hf-attn bench bars`: every speed that the project promises, measured here."""

from __future__ import annotations

import math
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from hf_attn.bench.bars import Bar, Result, Work, chosen
from hf_attn.bench.record import Store, git_version, hardware, version_of
from hf_attn.bench.timing import machine_load
from hf_attn.cli.bench_common import AGAIN, REPORT, WIDE, write_page
from hf_attn.cli.common import console, one_clear_line, progress_line


def bars(
    only: list[str] = typer.Option([], "--only", metavar="NAME ...", help="Bars whose name starts so."),
    runs: int = typer.Option(2, min=1, help="Runs of every command; the worst counts."),
    show: bool = typer.Option(False, "--list", help="List the bars, their commands and time, and measure nothing."),
    output: Path = typer.Option(Path("hf-attn-bars.csv"), "--output", help="Append figures to this .csv or .jsonl."),
    again: bool = AGAIN,
    report: Path = REPORT,
) -> None:
    """Measure all speed bars, one table: the bar, its figures, and whether it holds with 10 % to spare in every run.

    A figure that the output file has already (same machine, versions and code) is not measured again. Bars that need
    a GPU or a C++ compiler are skipped where there is none.

    Example: `hf-attn bench bars --only psa linear`
    """
    with one_clear_line():
        if report is not None:
            from hf_attn.bench.report import require_matplotlib

            require_matplotlib()
        names = [name for text in only for name in text.replace(",", " ").split()]
        work = Work(chosen(names), runs, None if show else Store(output, again=again), again)
        console.print(head_line(), highlight=False)
        minutes = math.ceil(work.seconds() / 60)
        console.print(f"{len(work.runnable())} processes to run, about {minutes} min on quiet cores", highlight=False)
        if show:
            wide = Console(width=max(console.width, WIDE), file=console.file)
            wide.print(list_of(work.bars))
            return
        with progress_line("bars") as progress:
            work.measure(progress)
        results = work.results()
        wide = Console(width=max(console.width, WIDE), file=console.file)
        wide.print(table_of(results))
        for result in results:
            if result.why:
                wide.print(f"{result.bar.name}: {result.why}", highlight=False, soft_wrap=True)
        console.print(summary(results), highlight=False)
        console.print(f"{machine_load()}; figures in {output}", highlight=False)
        if report is not None:
            write_page([output], report)


def head_line() -> str:
    return f"{hardware('cpu')}, torch {version_of('torch')}, hf-attn {git_version()}, {machine_load()}"


def asked(bar: Bar) -> str:
    return f"{'<=' if bar.most else '>='} {bar.bound:g}"


def list_of(bars: list[Bar]) -> Table:
    """What there is to measure."""
    table = Table("bar", "against", "asked", "needs", "seconds", "command", box=None, pad_edge=False)
    for bar in bars:
        table.add_row(bar.name, bar.what, asked(bar), bar.needs, f"{bar.seconds:g}", bar.line)
    return table


def table_of(results: list[Result]) -> Table:
    """The figures of every bar."""
    table = Table(box=None, pad_edge=False)
    for name in ("bar", "against", "asked", "measured", "result", "command"):
        table.add_column(name, overflow="fold")
    for result in results:
        bar, values = result.bar, " ".join(f"{value:.3g}" for value in result.values)
        table.add_row(bar.name, bar.what, asked(bar), values, result.verdict, bar.line)
    return table


def summary(results: list[Result]) -> str:
    """How many bars ended how."""
    verdicts = [result.verdict.partition(":")[0] for result in results]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
