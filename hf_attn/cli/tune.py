"""`hf-attn tune`: the fastest kernel configurations of this device, or a check of all of them without one."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hf_attn.checks import require_one_of
from hf_attn.cli.common import console, one_clear_line


def tune(
    check: bool = typer.Option(False, "--check", help="Compile every configuration ahead of time; needs no GPU."),
    target: list[str] = typer.Option([], "--target", help="With --check: sm_80, sm_90, gfx942; default all of them."),
    kernel: list[str] = typer.Option([], "--kernel", help="Only this kernel of the table; may be repeated."),
    dtype: list[str] = typer.Option(["bf16", "fp16", "fp32"], "--dtype", help="bf16, fp16, fp32; may be repeated."),
    output: Path = typer.Option(None, "--output", help="Table to write; default: the one of this source checkout."),
    head_dim: list[int] = typer.Option([], "--head-dim", help="64, 128 or 256; may be repeated; default all of them."),
    candidates: int = typer.Option(12, min=1, help="Configurations of a round for each kernel, the best one included."),
    rounds: int = typer.Option(3, min=1, help="Rounds of search, each around the best of the one before."),
    jobs: int = typer.Option(None, min=1, help="Processes that compile; default: one for every CPU."),
    minutes: float = typer.Option(None, min=0, help="Begin nothing new after this time; the next run goes on."),
    repeats: int = typer.Option(7, min=7, help="Interleaved repeats of each timing; the median counts."),
) -> None:
    """Time candidate configurations of every kernel on this GPU and write the best into the launch table.

    Candidates that do not fit the shared memory, spill registers or compute worse results are dropped first. A run that
    was interrupted goes on where it was. Rows of other devices stay as they are.

    Example: `hf-attn tune --output table.json`, then set `HF_ATTN_LAUNCH_TABLE=table.json`

    Example: `hf-attn tune --check --target sm_90`
    """
    with one_clear_line():
        for name in dtype:
            require_one_of("--dtype", name, ("bf16", "fp16", "fp32"))
        if check:
            passed = _check(target, dtype, kernel)
        elif target:
            raise ValueError("--target goes with --check; without it the target is the GPU at hand")
        else:
            _tune(dtype, kernel, head_dim, output, candidates, repeats, rounds, jobs, minutes)
            passed = True
    if not passed:
        raise typer.Exit(1)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)


def _tune(
    dtypes: list[str],
    kernels: list[str],
    head_dims: list[int],
    output: Path | None,
    candidates: int,
    repeats: int,
    rounds: int,
    jobs: int | None,
    minutes: float | None,
) -> None:
    from hf_attn.bench import tuning
    from hf_attn.bench.tuning_gpu import Gpu

    device = Gpu(repeats, jobs)
    output = tuning.default_output() if output is None else output
    tasks = tuning.find_tasks(device.target, "cuda", dtypes, kernels)
    known = sorted({task.head_dim for task in tasks})
    for size in head_dims:
        require_one_of("--head-dim", str(size), tuple(map(str, known)))
    tasks = [task for task in tasks if not head_dims or task.head_dim in head_dims]
    changed, done, start = 0, 0, time.perf_counter()
    seconds = math.inf if minutes is None else 60 * minutes
    try:
        with _progress() as progress:
            bar = progress.add_task("tuning", total=len(tasks))
            for search in tuning.tune(tasks, device, output, limit=candidates, rounds=rounds, seconds=seconds):
                progress.console.print(f"{search.task.key}: {_ending(search)}", highlight=False)
                progress.update(bar, advance=1, description=search.task.kernel)
                changed += search.best != search.start
                done += 1
    finally:
        device.close()
    seconds = time.perf_counter() - start
    console.print(
        f"{done} of {len(tasks)} tasks on {device.target}, {changed} changed, {seconds:.0f} s; wrote {output}"
    )


def _ending(search: Any) -> str:
    outcome = search.outcome
    if search.end.startswith("failed") or outcome is None:
        return search.end
    settings = " ".join(f"{name}={value}" for name, value in outcome.config.items())
    gain = outcome.current_milliseconds / outcome.milliseconds
    counts = f"{outcome.tried} tried in {search.rounds} rounds, {sum(outcome.dropped.values())} dropped"
    return f"{outcome.milliseconds:.3f} ms, {gain:.2f}x of before with {settings} ({counts})"


def _check(targets: list[str], dtypes: list[str], kernels: list[str]) -> bool:
    from hf_attn.bench import tuning
    from hf_attn.ops.hfattn_sparse import aot

    for name in targets:
        require_one_of("--target", name, tuple(aot.SHARED_LIMITS))
    with _progress() as progress:
        bar = progress.add_task("compiling", total=None)

        def step(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        found = tuning.check(targets or list(aot.SHARED_LIMITS), dtypes, kernels, step)
    table = Table(title="configurations compiled ahead of time", title_justify="left")
    for name in ("target", "kernel", "row", "configuration"):
        table.add_column(name)
    for name in ("programs", "registers", "spills", "shared", "limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for entry in found:
        settings = " ".join(f"{name}={value}" for name, value in entry.row["config"].items())
        row = f"{entry.row['target']} {entry.row['dtype']} D<={entry.row['head_dim']}"
        numbers = (entry.programs, entry.registers, entry.spills, entry.shared, aot.SHARED_LIMITS[entry.target])
        verdict = "[red]" + "; ".join(entry.problems) + "[/red]" if entry.problems else "ok"
        table.add_row(entry.target, entry.kernel, row, settings, *map(str, numbers), verdict)
    console.print(table)
    return not any(entry.problems for entry in found)
