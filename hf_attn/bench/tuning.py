"""Finding the fastest configuration of every kernel on the device at hand, and checking all of them without one.

`hf-attn tune` is the command. A kernel is timed inside the call of its op: the other kernels of the call keep their
configuration, so a difference is the kernel's own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_attn.bench.kernel_calls import KernelCall, Shape, available_calls, table_head_dims
from hf_attn.bench.timing import Timing
from hf_attn.ops.hfattn_sparse import launch
from hf_attn.ops.hfattn_sparse.launch import Row

Config = dict[str, int]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A candidate replaces the current configuration when it is faster by more than repeats differ on a quiet device.
WORTHWHILE = 1.02
# Parameters of tiles that tensor cores take: at least 16 wide.
_SMALLEST_TILE, _LARGEST_TILE, _MOST_WARPS, _MOST_STAGES = 16, 256, 16, 6
# Warps that no kernel has: launches with so many are those of the kernel whose configuration was forced.
_MARK = 1 << 20


@dataclass(frozen=True)
class Task:
    """One kernel, dtype and head dimension to tune, and the call that launches it."""

    kernel: str
    dtype: str
    head_dim: int
    call: KernelCall
    shape: Shape

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.dtype} {self.head_dim}"


@dataclass
class Outcome:
    """What tuning one task gave: the best configuration, its time and the current one's in ms, and why others fell."""

    config: Config
    milliseconds: float
    current: Config
    current_milliseconds: float
    tried: int
    dropped: dict[str, int] = field(default_factory=dict)


class Device(Protocol):
    """What tuning needs of a device; tests put another one in its place."""

    target: str
    name: str  # of the device and the compiler, for the table

    def prepare(self, pairs: list[tuple[Task, Config]]) -> None:
        """Begin to look for the obstacles of many configurations."""

    def obstacle(self, task: Task, config: Config) -> str | None:
        """Why the configuration cannot run ("does not compile", "shared memory", "spills"), found by compiling."""

    def wrong(self, task: Task, configs: list[Config]) -> list[bool]:
        """Whether the results under each configuration are worse than those of the first one allow."""

    def time(self, task: Task, configs: list[Config]) -> list[Timing]:
        """Interleaved times of the call under each configuration."""


def own_launches(task: Task, target: str, config: Config) -> list[launch.Launch]:
    """The launches of the task's kernel in its call, under a configuration; those of other kernels are left out."""
    shape = replace(task.shape, device="meta")
    with launch.forced_config(**{task.kernel: config | {"num_warps": _MARK}}):
        marked, _ = task.call.record(shape, target)
    with launch.forced_config(**{task.kernel: config}):
        launches, _ = task.call.record(shape, target)
    return [one for one, mark in zip(launches, marked, strict=True) if mark.options.get("num_warps") == _MARK]


def find_tasks(
    target: str, device: str, dtypes: Iterable[str], kernels: Iterable[str] = (), *, every_call: bool = False
) -> list[Task]:
    """Every kernel that some call launches, for these dtypes and the head dimensions of the table.

    Without repeats: the first call that launches a kernel stands for all of them, unless `every_call`.
    Raises ValueError for a kernel that no call launches.
    """
    found: dict[str, Task] = {}
    wanted = set(kernels)
    for dtype, head_dim, call in itertools.product(dtypes, table_head_dims(), available_calls()):
        shape = Shape(DTYPES[dtype], head_dim, q_len=8192, k_len=8192, heads=16, kv_heads=4)
        for kernel, name, size in call.record(shape, target)[1]:
            task = Task(kernel, name, size, call, replace(shape, device=device))
            found.setdefault(f"{task.key} {call.name * every_call}", task)
    unknown = wanted - {task.kernel for task in found.values()}
    if unknown:
        known = sorted({task.kernel for task in found.values()})
        raise ValueError(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [task for task in found.values() if not wanted or task.kernel in wanted]


def candidates(current: Config, limit: int) -> list[Config]:
    """The current configuration first, then its neighbours, nearest first, at most `limit` in all.

    Tile sizes and warps go a factor of two down and up, stages one.
    """
    choices = {name: _neighbours(name, value) for name, value in current.items()}
    found = []
    for values in itertools.product(*choices.values()):
        config = dict(zip(choices, values, strict=True))
        distance = sum(config[name] != current[name] for name in current)
        found.append((distance, config))
    found.sort(key=lambda item: item[0])
    return [config for _, config in found][:limit]


def _neighbours(name: str, value: int) -> list[int]:
    if name == "num_stages":
        return [n for n in (value - 1, value, value + 1) if 1 <= n <= _MOST_STAGES]
    low, high = (1, _MOST_WARPS) if name == "num_warps" else (_SMALLEST_TILE, max(_LARGEST_TILE, 2 * value))
    return [n for n in (value // 2, value, value * 2) if n == value or low <= n <= high]


def tune_task(task: Task, device: Device, tried: list[Config]) -> Outcome:
    """Drop what does not fit by compiling, then what computes wrongly, then time the rest; the first may stay."""
    current, fitting, dropped = tried[0], [], {}
    for config in tried:
        reason = device.obstacle(task, config)
        if reason is None or (config == current and reason == "spills"):
            fitting.append(config)
        elif config == current:
            raise RuntimeError(f"the current configuration of {task.key} cannot run: {reason}")
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    wrong = device.wrong(task, fitting)
    if wrong[0]:
        raise RuntimeError(f"{task.key} computes wrongly under its current configuration {current}; nothing was timed")
    if any(wrong):
        dropped["wrong results"] = sum(wrong)
    right = [config for config, bad in zip(fitting, wrong, strict=True) if not bad]
    times = [timing.median for timing in device.time(task, right)]
    best = min(range(len(right)), key=times.__getitem__)
    if times[0] < times[best] * WORTHWHILE:
        best = 0
    return Outcome(right[best], times[best] * 1e3, current, times[0] * 1e3, len(tried), dropped)


@dataclass
class Search:
    """Where the search for one task stands: rounds done, what was tried, the best so far; `end` says why it ended."""

    task: Task
    start: Config
    rounds: int = 0
    tried: list[Config] = field(default_factory=list)
    outcome: Outcome | None = None
    end: str = ""

    @property
    def best(self) -> Config:
        return self.start if self.outcome is None else self.outcome.config

    def next(self, limit: int) -> list[Config]:
        """The best configuration and those of its neighbours that were not tried, at most `limit` in all."""
        fresh = [c for c in candidates(self.best, 10**6) if c not in self.tried and c != self.best]
        return [self.best, *fresh][:limit]

    def take(self, found: Outcome, tried: list[Config], rounds: int) -> None:
        """Add a round to the outcome; ends when the round brought nothing or was the last."""
        self.rounds += 1
        self.tried += [config for config in tried if config not in self.tried]
        moved = found.config != self.best
        if self.outcome is not None:
            old = self.outcome
            # Each round measures its own start again; the gain of all rounds is the product of theirs.
            found.current_milliseconds *= old.current_milliseconds / old.milliseconds
            found.current, found.tried = old.current, len(self.tried)
            found.dropped = {k: old.dropped.get(k, 0) + found.dropped.get(k, 0) for k in {*old.dropped, *found.dropped}}
        self.outcome = found
        self.end = "" if moved and self.rounds < rounds else "settled"

    def saved(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "tried": self.tried, "outcome": asdict(self.outcome) if self.outcome else None,
                "end": self.end}  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        self.rounds, self.tried, self.end = saved["rounds"], saved["tried"], saved["end"]
        self.outcome = Outcome(**saved["outcome"]) if saved["outcome"] else None


def tune(
    tasks: list[Task], device: Device, output: Path, *, limit: int = 40, rounds: int = 1, seconds: float = math.inf
) -> Iterator[Search]:
    """Tune tasks; each result is in the table `output` before the next starts.

    In every round each task looks around its best configuration so far; one that stays where it is has settled. A task
    whose call fails ends with the reason, and the others go on. A file beside the table notes what is done, so that an
    interrupted run goes on where it was; it is removed when all have settled. After `seconds` nothing new is begun.
    Yields every search that has ended; one found in that file has `rounds` as noted there.
    """
    clock = time.monotonic
    progress = output.with_suffix(f".{device.target}.progress.json")
    known = json.loads(progress.read_text()) if progress.is_file() else {}
    stop, searches = clock() + seconds, []
    for task in tasks:
        start = dict(launch.find_row(task.kernel, device.target, task.dtype, task.head_dim)["config"])
        searches.append(Search(task, start))
        # What failed is tried again: another version or device state may do.
        if task.key in known and not known[task.key]["end"].startswith("failed"):
            searches[-1].restore(known[task.key])
    yield from (search for search in searches if search.end)
    while active := [search for search in searches if not search.end]:
        plans = [search.next(limit) for search in active]
        device.prepare([(s.task, config) for s, plan in zip(active, plans, strict=True) for config in plan])
        for search, plan in zip(active, plans, strict=True):
            if clock() > stop:
                return
            try:
                found = tune_task(search.task, device, plan)
            except RuntimeError as error:
                search.end = f"failed: {error}".splitlines()[0]
            else:
                search.take(found, plan, rounds)
                row = {"target": device.target, "dtype": search.task.dtype, "head_dim": search.task.head_dim}
                row |= {"config": search.best, "measured": device.name}
                rows = launch.read_table(output) if output.is_file() else {}
                write_table(output, with_row(rows, search.task.kernel, row))
            known[search.task.key] = search.saved()
            _write(progress, json.dumps(known, indent=1))
            if search.end:
                yield search
    if not any(search.end.startswith("failed") for search in searches):
        progress.unlink(missing_ok=True)


def with_row(table: dict[str, list[Row]], kernel: str, row: Row) -> dict[str, list[Row]]:
    """The table with this row in place of the one for the same target, dtype and head dimension; others stay."""

    def same(other: Row) -> bool:
        return all(other[name] == row[name] for name in ("target", "dtype", "head_dim"))

    rows = table.get(kernel, [])
    position = next((i for i, other in enumerate(rows) if same(other)), len(rows))
    return table | {kernel: [*rows[:position], row, *rows[position + 1 :]]}


def write_table(path: Path, table: dict[str, list[Row]]) -> None:
    """Write a table, one row a line."""
    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    _write(path, "{\n" + ",\n".join(kernels) + "\n}\n")


def _write(path: Path, text: str) -> None:
    """Replace a file at once: an interrupted run leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def default_output() -> Path:
    """The committed table in a source checkout, else the file that HF_ATTN_LAUNCH_TABLE names."""
    if (launch.TABLE.parents[2] / "build.toml").is_file():
        return launch.TABLE
    own = os.environ.get(launch.TABLE_VARIABLE)
    if not own:
        raise ValueError(
            f"an installed package keeps its table; give --output FILE, and set {launch.TABLE_VARIABLE}=FILE to use it"
        )
    return Path(own)


@dataclass(frozen=True)
class Checked:
    """All programs of one kernel that one row of the table gives on one target."""

    kernel: str
    target: str
    row: Row
    programs: int
    shared: int
    registers: int
    spills: int
    problems: tuple[str, ...]


def check(
    targets: list[str],
    dtypes: list[str],
    kernels: Iterable[str] = (),
    step: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Checked]:
    """Compile what every row of the table gives, without a GPU; `step` hears (what, done, all)."""
    from hf_attn.ops.hfattn_sparse import aot

    found: dict[str, tuple[Task, str, Row, dict]] = {}
    for target in targets:
        for task in find_tasks(target, "meta", dtypes, kernels, every_call=True):
            row = launch.find_row(task.kernel, target, task.dtype, task.head_dim)
            *_, programs = found.setdefault(f"{task.kernel} {target} {row}", (task, target, row, {}))
            for program in aot.distinct(own_launches(task, target, row["config"])):
                programs[program.key] = program
    total, done = sum(len(programs) for *_, programs in found.values()), 0
    checked = []
    for task, target, row, programs in found.values():
        built, problems = [], []
        for program in programs.values():
            step(f"{task.kernel} on {target}", done, total)
            done += 1
            try:
                built.append(aot.compile_launch(program))
            except Exception as error:
                problems.append(f"does not compile: {type(error).__name__}: {error}".splitlines()[0][:300])
        may_spill = task.head_dim > 128 or target != "sm_90"
        found_problems = (aot.problem(b, spills_allowed=may_spill, measured="measured" in row) for b in built)
        problems += [p for p in found_problems if p]
        worst = [max((getattr(b, name) for b in built), default=0) for name in ("shared", "registers", "spills")]
        checked.append(Checked(task.kernel, target, row, len(programs), *worst, tuple(dict.fromkeys(problems))))
    step("done", total, total)
    return checked
