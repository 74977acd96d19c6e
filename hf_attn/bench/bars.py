"""Measuring the speed bars of `bar_list`: one process a command and run, verdicts, and a file that goes on."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hf_attn.bench.bar_list import BARS, WHY, Bar
from hf_attn.bench.figures import Row, collect
from hf_attn.bench.peers import cxx_missing
from hf_attn.bench.record import KERNEL_WORDS, Store, environment, hardware, key_of, read_rows
from hf_attn.bench.record import Row as Record
from hf_attn.checks import did_you_mean

# A bar holds with this much to spare; runs of one bar that differ by more than `RESTLESS` decide nothing, and a run
# whose dense (or peer) rounds spread by more does not count.
SPARE, RESTLESS = 1.1, 0.15
_TIMEOUT = 3600
_SKIPPED = "skipped: "
# Notes on bars as they are measured with the CPU kernel begin so.
KERNEL_NOTE = "kernel: "


@dataclass(frozen=True)
class Figure:
    """What one run of a command says about one bar."""

    value: float | None
    problem: str = ""

    @property
    def skipped(self) -> bool:
        return self.problem.startswith(_SKIPPED)


@dataclass(frozen=True)
class Result:
    """A bar and the figures of its runs, on what they were measured."""

    bar: Bar
    figures: tuple[Figure, ...]
    hardware: str = ""

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(f.value for f in self.figures if f.value is not None)

    @property
    def verdict(self) -> str:
        """ "met, 10 % to spare", "met", "missed", "rejected: ..." or "skipped: ..."; the worst of the runs counts."""
        for figure in self.figures:
            if figure.problem:
                return figure.problem if figure.skipped else f"rejected: {figure.problem}"
        values = self.values
        if not values:
            return "not measured"
        difference = max(values) / min(values) - 1
        margins = [self.bar.margin(value) for value in values]
        # Where all runs are on one side of the bar their difference does not matter.
        if difference > RESTLESS and min(margins) < 1 <= max(margins):
            return f"rejected: runs differ by {difference:.0%}"
        worst = min(margins)
        return "met, 10 % to spare" if worst >= SPARE else "met" if worst >= 1 else "missed"

    @property
    def why(self) -> str:
        """For a missed bar, what limits it and what was tried."""
        if self.verdict != "missed":
            return ""
        # With the compiled CPU kernel other things limit a bar.
        name = KERNEL_NOTE * (KERNEL_WORDS in self.hardware) + self.bar.name
        found = [text for note, text in WHY.items() if name.startswith(note)]
        return found[0] if found else "no explanation is recorded"


@dataclass
class Work:
    """Commands, their bars, and what a file of results has of them already."""

    bars: Sequence[Bar]
    runs: int
    store: Store | None = None
    again: bool = False
    found: dict[tuple[str, int], Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.store is None or self.again or not self.store.path.exists():
            return
        known = {key_of(row): row for row in read_rows([self.store.path])}
        for bar in self.bars:
            for number in range(self.runs):
                row = known.get(key_of(record_of(bar, number, self.runs)))
                if row is not None and row["status"] == "ok":
                    self.found[bar.name, number] = Figure(row["speedup"])

    def todo(self) -> list[tuple[str, int, list[Bar]]]:
        """(command, number of the run, its bars) that have no figure yet."""
        commands: dict[str, list[Bar]] = {}
        for bar in self.bars:
            commands.setdefault(bar.command, []).append(bar)
        return [
            (command, number, missing)
            for command, members in commands.items()
            for number in range(self.runs)
            if (missing := [bar for bar in members if (bar.name, number) not in self.found])
        ]

    def seconds(self) -> float:
        """What the commands are estimated to take."""
        return sum(members[0].seconds for members in self.runnable())

    def runnable(self) -> list[list[Bar]]:
        """The bars of each process that will be started."""
        return [members for _, _, members in self.todo() if not obstacle(members[0])]

    def measure(self, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Run what is missing, and keep each figure as soon as it is there. `progress` counts estimated seconds."""
        total, done = max(1, round(self.seconds())), 0.0
        for command, number, members in self.todo():
            blocked = obstacle(members[0])
            start = time.perf_counter()
            figures = [Figure(None, _SKIPPED + blocked)] * len(members) if blocked else run(command, members)
            elapsed = time.perf_counter() - start
            for bar, figure in zip(members, figures, strict=True):
                self.found[bar.name, number] = figure
                if self.store is not None:
                    self.store.add(_kept(bar, number, self.runs, figure, elapsed))
            if not blocked:
                done += members[0].seconds
                progress(round(done), total)

    def results(self) -> list[Result]:
        runs = range(self.runs)
        machine = hardware("cpu")
        return [
            Result(
                bar,
                tuple(self.found[bar.name, n] for n in runs if (bar.name, n) in self.found),
                "" if bar.needs == "gpu" else machine,
            )
            for bar in self.bars
        ]


def obstacle(bar: Bar) -> str:
    """What a bar lacks on this machine, "" where it can run."""
    import torch

    if bar.needs == "gpu" and not torch.cuda.is_available():
        return "needs a GPU"
    if bar.needs == "cxx":
        return (cxx_missing() or "").removeprefix("not run: ")
    return ""


def run(command: str, bars: Sequence[Bar]) -> list[Figure]:
    """One run of a command, a figure for each of its bars."""
    module, *arguments = shlex.split(command)
    try:
        rows = collect(module, arguments, timeout=_TIMEOUT)
    except RuntimeError as error:
        return [Figure(None, str(error))] * len(bars)
    return [read(bar, rows) for bar in bars]


def read(bar: Bar, rows: Iterable[Row]) -> Figure:
    """The figure of a bar; of several cases that begin with its words the worst counts."""
    rows = list(rows)
    fitting = [row for row in rows if row.case == bar.case or row.case.startswith(bar.case + " ")]
    if not fitting:
        return Figure(None, f"no case {bar.case!r}; there are {', '.join(row.case for row in rows)}")
    for row in fitting:
        if row.problem:
            return Figure(None, row.problem)
        if bar.figure not in row.figures:
            return Figure(None, f"no figure {bar.figure!r} of {row.case!r}")
        if row.spread is not None and row.spread > RESTLESS:
            return Figure(None, f"dense or peer rounds spread by {row.spread:.0%}")
    return Figure(min((row.figures[bar.figure] for row in fitting), key=bar.margin))


def record_of(bar: Bar, number: int, runs: int) -> Record:
    """The key of one run of a bar in a file of results."""
    where = environment("cuda" if bar.needs == "gpu" and not obstacle(bar) else "cpu")
    asked = f"{'<=' if bar.most else '>='} {bar.bound:g}"
    return where | {
        "level": "bar", "name": bar.name, "variant": f"run {number + 1} of {runs}", "shape": bar.what,
        "requested": asked, "options": bar.command, "threads": bar.threads,
    }  # fmt: skip


def _kept(bar: Bar, number: int, runs: int, figure: Figure, seconds: float) -> Record:
    status = "ok" if not figure.problem else figure.problem if figure.skipped else f"rejected: {figure.problem}"
    kept = {"status": status, "speedup": figure.value, "ms": 1e3 * seconds, "timer": "whole command"}
    return record_of(bar, number, runs) | kept


def chosen(only: Iterable[str]) -> list[Bar]:
    """Bars whose name starts with one of the words, all without a word. Raises ValueError for a word that fits none."""
    only = list(only)
    for word in only:
        if not any(bar.name.startswith(word) for bar in BARS):
            names = list(dict.fromkeys(bar.name.split("-")[0] for bar in BARS))
            raise ValueError(
                f"no bar is called {word!r}{did_you_mean(word, names)}; names begin with {', '.join(names)}, and "
                "--list shows them all"
            )
    return [bar for bar in BARS if not only or any(bar.name.startswith(word) for word in only)]


def results_of(records: Iterable[Record]) -> list[Result]:
    """The results that rows of files of results hold, of bars that there still are; the last run of each number.

    A bar that was measured on several machines, or with and without the CPU kernel, has a result for each.
    """
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for row in records:
        if row["level"] == "bar":
            problem = "" if row["status"] == "ok" else row["status"].removeprefix("rejected: ")
            runs = found.setdefault((row["name"], row["hardware"] or ""), {})
            runs[row["variant"]] = Figure(row["speedup"], problem)
    machines = dict.fromkeys(machine for _, machine in found)
    return [
        Result(bar, tuple(found[bar.name, machine].values()), machine)
        for machine in machines
        for bar in BARS
        if (bar.name, machine) in found
    ]
