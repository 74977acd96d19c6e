"""What commands share: the console, one clear line on bad input, options from NAME=VALUE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperCommand

console = Console()
_errors = Console(stderr=True)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Turn an error of the library into one line on standard error and exit status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise failed(" ".join(str(error).split()), status=2) from None


def failed(message: str, *, status: int) -> typer.Exit:
    """Print the message, as it stands, on standard error; what to raise."""
    _errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True, markup=True)
    return typer.Exit(status)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["top_k=8", "decode=moba", 'layers={"-1": null}']` as a dict; values are JSON, or plain strings."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"options are NAME=VALUE, got {pair!r}; example: top_k=8")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def parse_integers(name: str, text: str, minimum: int) -> list[int]:
    """Integers separated by commas or spaces, ascending and without repeats."""
    try:
        sizes = sorted({int(part) for part in text.replace(",", " ").split()})
    except ValueError:
        sizes = []
    if not sizes:
        raise ValueError(f"{name} must be comma-separated integers, got {text!r}; example: 2048,4096")
    if sizes[0] < minimum:
        raise ValueError(f"{name} must be at least {minimum} tokens, got {sizes[0]}")
    return sizes


class NumberLists(TyperCommand):
    """A command whose `--lengths` takes several numbers: `--lengths 2048 4096` is `--lengths "2048 4096"`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if len(joined) > 1 and joined[-2] == "--lengths" and arg.isdecimal():
                joined[-1] += f" {arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


@contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left; `update(done, total)`. Where there is no terminal, a line every tenth of the work."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as progress:
        work = progress.add_task(what, total=None)
        printed = 0

        def update(done: int, total: int) -> None:
            nonlocal printed
            progress.update(work, completed=done, total=total)
            if not console.is_terminal and 10 * done // total > printed:
                printed = 10 * done // total
                left = progress.tasks[work].time_remaining
                console.print(f"{what} {printed}0%" + ("" if left is None else f", about {left:.0f} s left"))

        yield update
