"""What the levels of `hf-attn bench` share: their options, the table that grows, and where rows go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.levels import DTYPES, PASSES, Plan, fitting_lengths, summary
from hf_attn.bench.record import Row, Store, git_version, hardware
from hf_attn.bench.timing import machine_load
from hf_attn.cli.common import console, parse_integers, progress_line

OUTPUT = Path("hf-attn-bench.csv")
# Columns that a table of rows needs; a narrower terminal wraps its lines.
WIDE = 190
LENGTHS = typer.Option("", metavar="N N ...", help="Tokens; default: what fits into half of the free memory.")
DENSITY = typer.Option("0.125", metavar="X X ...", help="Shares of the visible pairs, in (0, 1].")
DTYPE = typer.Option("", metavar="NAME ...", help="fp32, bf16, fp16; default fp32 and bf16 on a CPU, bf16 on a GPU.")
PASS = typer.Option("forward backward decode", "--passes", metavar="NAME ...", help="forward, backward, decode.")
PATH = typer.Option("", "--path", metavar="NAME ...", help="auto, torch, triton, flex, natten, fla; default: all here.")
DEVICE = typer.Option("", help="cpu or cuda; default cuda where there is one.")
HEADS = typer.Option(None, min=1, help="Query heads; default 8 on a CPU, 16 on a GPU.")
KV_HEADS = typer.Option(None, min=1, help="Key and value heads; default 4.")
HEAD_DIM = typer.Option(None, min=8, help="Default 64 on a CPU, 128 on a GPU.")
BLOCK = typer.Option(128, min=8, help="Tokens of a block.")
THREADS = typer.Option(1, min=1, help="CPU threads.")
REPEATS = typer.Option(7, min=7, help="Counted interleaved rounds.")
GRAPHS = typer.Option(True, "--graphs/--no-graphs", help="CUDA: time captured graphs, the launches beside them.")
RESULTS = typer.Option(OUTPUT, "--output", help="Append rows to this .csv or .jsonl file.")
AGAIN = typer.Option(False, "--again", help="Measure rows that the file has already.")
RUN = typer.Option("", "--run", help="A name that keeps rows apart from those of another run.")
REPORT = typer.Option(None, "--report", help="Write an HTML page with plots of the file, and PNGs beside it.")
_LISTS = ("--lengths", "--density", "--dtype", "--passes", "--path", "--threads-list", "--only")


class ListOptions(TyperCommand):
    """A command whose lists need no quotes: `--dtype fp32 bf16` is `--dtype "fp32 bf16"`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if len(joined) > 1 and joined[-2] in _LISTS and _is_value(joined[-2], arg):
                joined[-1] += f" {arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def _is_value(option: str, text: str) -> bool:
    if option in ("--lengths", "--density", "--threads-list"):
        return text.replace(".", "", 1).isdecimal()
    if option == "--only":
        return not text.startswith("-")
    words = {
        "--dtype": DTYPES,
        "--passes": (*PASSES, "prefill", "train"),
        "--path": ("auto", "torch", "triton", "flex", "natten", "fla"),
    }
    return text in words[option]


def words_of(name: str, text: str, allowed: Iterable[str]) -> list[str]:
    """Words of a list, each allowed; raises ValueError naming the option."""
    found = text.replace(",", " ").split()
    unknown = [word for word in found if word not in allowed]
    if unknown or not found:
        raise ValueError(f"{name} must be of {', '.join(allowed)}, got {text!r}")
    return list(dict.fromkeys(found))


def numbers_of(name: str, text: str) -> list[float]:
    """Shares in (0, 1]; raises ValueError naming the option."""
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 < x <= 1 for x in found):
        raise ValueError(f"{name} must be numbers in (0, 1], got {text!r}; example: 0.125 0.25")
    return found


def device_of(name: str) -> str:
    """The device to measure; raises ValueError for one that is not there."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    return name


def make_plan(
    *, lengths: str, density: str, dtype: str, passes: str, path: str, device: str, heads: int | None,
    kv_heads: int | None, head_dim: int | None, block: int, threads: int, repeats: int, graphs: bool, run: str,
) -> Plan:  # fmt: skip
    """The plan that options ask for; sets the number of threads."""
    device = device_of(device)
    cuda = device == "cuda"
    dtypes = words_of("--dtype", dtype or ("bf16" if cuda else "fp32 bf16"), DTYPES)
    shape = Shape(
        heads=heads or (16 if cuda else 8), kv_heads=kv_heads or 4, head_dim=head_dim or (128 if cuda else 64)
    )
    if shape.heads % shape.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {shape.heads} and {shape.kv_heads}")
    densities, kinds = numbers_of("--density", density), words_of("--passes", passes, PASSES)
    paths = path.replace(",", " ").split()
    torch.set_num_threads(threads)
    sizes = parse_integers("--lengths", lengths, 64) if lengths else fitting_lengths(device, shape, dtypes)
    return Plan(device, dtypes, sizes, densities, kinds, paths, shape, block, repeats, graphs, run)


def head_line(plan: Plan) -> str:
    git = git_version()
    return (
        f"{hardware(plan.device)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {machine_load()}"
        + (f", hf-attn {git}" if git else "")
        + f"; lengths {' '.join(map(str, plan.lengths))}"
    )


def carry_out(
    what: str,
    plan: Plan,
    store: Store,
    rows: Callable[[Callable[[int, int], None]], Iterator[Row]],
    report: Path | None,
) -> None:
    """Measure with a progress bar, print the table, and write the report."""
    if report is not None:
        from hf_attn.bench.report import require_matplotlib

        require_matplotlib()
    console.print(head_line(plan), highlight=False)
    with progress_line(what) as progress:
        found = list(rows(progress))
    if found:
        Console(width=max(console.width, WIDE), file=console.file).print(table_of(found))
        console.print(machine_load(), highlight=False)
    console.print(f"{len(found)} new rows in {store.path}", highlight=False)
    if report is not None:
        write_page([store.path], report)


def table_of(rows: list[Row]) -> Table:
    """Rows as a table; columns that are empty everywhere are left out."""
    cells = [summary(row) for row in rows]
    table = Table(box=None, pad_edge=False)
    names = [name for name in cells[0] if any(cell[name] for cell in cells)]
    for name in names:
        words = name in ("case", "variant", "dtype", "pass", "note")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=name != "note")
    for cell in cells:
        table.add_row(*(cell[name] for name in names))
    return table


def write_page(files: list[Path], output: Path) -> None:
    """The report of files of results."""
    from hf_attn.bench.report import write_report

    for path in write_report(files, output):
        console.print(f"wrote {path}", highlight=False)
