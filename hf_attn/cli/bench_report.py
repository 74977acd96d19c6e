"""`hf-attn bench report`: a page of plots from files of results."""

from __future__ import annotations

from pathlib import Path

import typer

from hf_attn.bench.record import committed_results
from hf_attn.cli.bench_common import write_page
from hf_attn.cli.common import one_clear_line


def report(
    files: list[Path] = typer.Argument(None, metavar="[FILES...]", help="Default: the results that come with hf-attn."),
    output: Path = typer.Option(Path("hf-attn-bench.html"), "--output", help="The page; its plots go beside it."),
) -> None:
    """Write one HTML page with plots of results: speed-up against length, fraction of the limit, crossover lengths.

    Example: `hf-attn bench report hf-attn-bench.csv --output bench.html`
    """
    with one_clear_line():
        write_page(files or committed_results(), output)
