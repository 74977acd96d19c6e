"""Every speed bar of the project: what it asks for, and the command that measures it. `hf-attn bench bars`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A bar holds with this much to spare; runs of one bar that differ by more than `RESTLESS` decide nothing.
SPARE, RESTLESS = 1.1, 0.15
_TIMEOUT = 900


@dataclass(frozen=True)
class Bar:
    """A speed that the project promises.

    Args:
        name: for `--only`; unique.
        what: what is measured against what.
        command: module of `hf_attn.bench` and its arguments.
        figure: expression whose group is the figure in a line that the command prints.
        bound: what the figure must reach.
        most: the figure must stay below the bound instead.
    """

    name: str
    what: str
    command: str
    figure: str
    bound: float
    most: bool = False

    def margin(self, value: float) -> float:
        """How far the bar is passed, 1 exactly at it."""
        return self.bound / value if self.most else value / self.bound

    @property
    def line(self) -> str:
        return f"python -m hf_attn.bench.{self.command}"


@dataclass(frozen=True)
class Result:
    """The figures of a bar's runs, and why there are none."""

    bar: Bar
    values: tuple[float, ...]
    problem: str = ""

    @property
    def verdict(self) -> str:
        """ "met, 10 % to spare", "met", "missed" or "rejected: ..."; the worst of the runs counts."""
        if self.problem:
            return f"rejected: {self.problem}"
        difference = max(self.values) / min(self.values) - 1
        margins = [self.bar.margin(value) for value in self.values]
        # Where all runs are on one side of the bar their difference does not matter.
        if difference > RESTLESS and min(margins) < 1 <= max(margins):
            return f"rejected: runs differ by {difference:.0%}"
        worst = min(margins)
        return "met, 10 % to spare" if worst >= SPARE else "met" if worst >= 1 else "missed"


def _last(start: str, behind: str) -> str:
    """A figure near the end of the line that starts with `start`, `behind` following it."""
    return rf"^{start} .*? ([\d.]+){behind}$"


def _flex() -> list[Bar]:
    bars = []
    for threads in (1, 2):
        for dtype, bound in (("fp32", 1.15), ("bf16", 1.5)):
            for length in (4096, 8192):
                for kind, words in (("lower", "causal"), ("full", "bidirectional")):
                    bars.append(
                        Bar(
                            f"flex-{words}-{dtype}-{length}-{threads}t",
                            f"compiled flex_attention, 12.5 %, {words}, {dtype}, {length}, {threads} thread(s)",
                            f"flex_speed --threads {threads} --dtype {dtype} --length {length} --kind {kind}",
                            rf"^{kind} .*? ([\d.]+)  \w",
                            bound if threads == 1 else 1.0,
                        )
                    )
    return bars


_SPARSE, _PSA = "block_sparse_speed --dtype fp32 --repeats 7", "psa_speed --density 0.25 0.2 0.125"
_DECODE = 'decode_layer --lengths 32768 65536 --variants "per query head" group_max'
_NEAR, _PARO, _MEMORY = "neighborhood_speed --repeats 7", "paro_speed attention --repeats 7", "memory_speed --repeats 7"
_LANDMARK, _CORE, _UOE = "landmark_decode", "blockrank_speed core", "selective_speed --lengths 4096"
_SCAN, _WINDOWS = "selective_scan_speed --sizes 1 16 --repeats 7", "vision_windows_speed --repeats 9"
_ROUTED, _VIDEO = "routed_speed --repeats 7 --lengths 16384 32768", "video_speed --attention --head-dim 64 --repeats 7"
_MOH = "head_routed_speed --lengths 2048 4096 --top-k 3"

BARS = (
    Bar("block-sparse", "limit in % at 8 blocks a row of 64, fp32", _SPARSE,
        _last("fp32 +1/8 of the blocks a row, per head", "%"), 60),
    Bar("block-sparse-training", "limit in % at 8 blocks a row, forward and backward", f"{_SPARSE} --backward",
        _last("fp32 +1/8 of the blocks a row, per head", "%"), 60),
    Bar("moba-16k", "dense, routing included, 16384", _ROUTED, _last(" *16384", r" +[\d.]+"), 1.8),
    Bar("moba-32k", "dense, routing included, 32768", _ROUTED, _last(" *32768", r" +[\d.]+"), 3),
    Bar("linear", "dense, 4096, 4 heads", "linear_speed --heads 4", r"^\| 4 \| [\d.]+ \| [\d.]+ \| ([\d.]+)x", 4),
    Bar("lserve-32k", "dense over the whole cache, a list a query head", _DECODE,
        _last(" *32768 +per query head", r" +[-\d.]+% +[\d.]+"), 2.5),
    Bar("lserve-64k", "the same, 65536", _DECODE, _last(" *65536 +per query head", r" +[-\d.]+% +[\d.]+"), 6),
    Bar("lserve-group-32k", "the same, a list a group, 32768", _DECODE,
        _last(" *32768 +group_max", r" +[-\d.]+% +[\d.]+"), 6),
    Bar("lserve-selector", "share of the selector in %, reuse 4", _DECODE,
        r"^ *32768 +per query head .*? ([-\d.]+)% +[\d.]+$", 25, True),
    Bar("neighborhood-image", "masked dense, 56x56, windows of 7", _NEAR,
        r"^56x56 K=7x7 +fwd .*? ([\d.]+)x +[\d.]+x", 8),
    Bar("neighborhood-video", "masked dense, 16x32x32, windows of 5x7x7", _NEAR,
        r"^16x32x32 K=5x7x7 +fwd .*? ([\d.]+)x +[\d.]+x", 10),
    Bar("neighborhood-plain", "dense without a mask, 56x56", _NEAR,
        r"^56x56 K=7x7 +fwd .*? [\d.]+x +([\d.]+)x", 5),
    Bar("landmark-16k", "dense over the whole cache, 16384", _LANDMARK, r"^\| 16384 \|.* ([\d.]+) \|$", 4),
    Bar("landmark-32k", "the same, 32768", _LANDMARK, r"^\| 32768 \|.* ([\d.]+) \|$", 8),
    Bar("blockrank-20", "dense, 20 documents", _CORE, _last(" *20", ""), 2.5),
    Bar("blockrank-50", "dense, 50 documents", _CORE, _last(" *50", ""), 4.5),
    Bar("blockrank-100", "dense, 100 documents", _CORE, _last(" *100", ""), 7),
    Bar("moh-2048", "dense, 6 of 9 heads, 2048", _MOH, _last(" *2048 +6/9", r" +[\d.]+"), 1.25),
    Bar("moh-4096", "dense, 6 of 9 heads, 4096", _MOH, _last(" *4096 +6/9", r" +[\d.]+"), 1.1),
    Bar("uoe-2", "dense, 2 of 3 experts, 4096", _UOE, r"^\| 4096 \| 2 of 3 \|.* ([\d.]+) \|$", 1.6),
    Bar("uoe-1", "dense, 1 of 3 experts, 4096", _UOE, r"^\| 4096 \| 1 of 3 \|.* ([\d.]+) \|$", 4),
    Bar("titans", "token by token, 1024", _MEMORY, r"^chunks ([\d.]+)x faster", 3),
    Bar("titans-growth", "time at 4096 over 1024", _MEMORY, r"^chunks .*= ([\d.]+)$", 4.8, True),
    Bar("lamamba-scan-1", "transformers' scan, n = 1", _SCAN, r"^\| 1 \|.*? ([\d.]+)x", 3),
    Bar("lamamba-scan-16", "transformers' scan, n = 16", _SCAN, r"^\| 16 \|.*? ([\d.]+)x", 1),
    *(Bar(f"psa-{dtype}-{density}", f"dense, {dtype}, density {density}, 8192", f"{_PSA} --dtype {dtype}",
          _last(rf"{dtype} +{density}", r" +[\d.]+%"), bound)
      for dtype, bounds in (("fp32", (2.2, 2.8, 3.8)), ("bf16", (1.9, 2.4, 3.3)))
      for density, bound in zip((0.25, 0.2, 0.125), bounds, strict=True)),
    Bar("paro-0.5", "dense, reordering included, density 0.5", _PARO, _last(r" *0\.50\d", r" +[\d.]+%"), 1.5),
    Bar("paro-0.25", "dense, reordering included, density 0.25", _PARO, _last(r" *0\.25\d", r" +[\d.]+%"), 2.5),
    Bar("vmoba-0.2", "dense, slowest partition, density 0.2", f"{_VIDEO} --mechanism vmoba --density 0.2",
        _last("vmoba", r" +[\d.]+ +\d+%"), 2.2),
    Bar("vmoba-0.125", "dense, slowest partition, density 0.125", f"{_VIDEO} --mechanism vmoba --density 0.125",
        _last("vmoba", r" +[\d.]+ +\d+%"), 3),
    Bar("biformer", "dense, 56x56, 4 of 49 regions", "bilevel_speed", r"^forward +[\d.]+ +[\d.]+ +([\d.]+)x", 3),
    Bar("emov2-window", "dense, 32x32, dim 160", f"{_WINDOWS} spanned", r"^spanned 32x32 .*? ([\d.]+)x", 2),
    Bar("overlock-mixing", "unfolded windows, 28x28, K 13", f"{_WINDOWS} mixing",
        r"^mixing 28x28 K 13 4 x 16 .*? ([\d.]+)x", 2),
    Bar("dinat", "masked dense, a backbone at 512 pixels", "oneformer_speed --parts dinat", r" ([\d.]+)x$", 3),
    *_flex(),
)  # fmt: skip


def chosen(only: Iterable[str]) -> list[Bar]:
    """Bars whose name starts with one of the words, all without a word. Raises ValueError for a word that fits none."""
    only = list(only)
    for word in only:
        if not any(bar.name.startswith(word) for bar in BARS):
            raise ValueError(f"no bar is called {word!r}; there are {', '.join(bar.name for bar in BARS)}")
    return [bar for bar in BARS if not only or any(bar.name.startswith(word) for word in only)]


def measure(bars: Iterable[Bar], runs: int = 2) -> Iterator[Result]:
    """Run every command `runs` times, in processes of their own, and read its bars from what it prints."""
    commands: dict[str, list[Bar]] = {}
    for bar in bars:
        commands.setdefault(bar.command, []).append(bar)
    for command, members in commands.items():
        printed = [run(command) for _ in range(runs)]
        for bar in members:
            yield read(bar, printed)


def run(command: str) -> tuple[str, str]:
    """What a command printed, and what went wrong."""
    module, *arguments = shlex.split(command)
    line = [sys.executable, "-m", f"hf_attn.bench.{module}", *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no result within {_TIMEOUT} s"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout, "" if done.returncode == 0 else f"the command failed: {last[:160]}"


def read(bar: Bar, printed: Iterable[tuple[str, str]]) -> Result:
    """The figures of one bar; of several lines that fit the worst counts."""
    values = []
    for text, problem in printed:
        if problem:
            return Result(bar, (), problem)
        lines = [found for line in text.splitlines() if (found := re.search(bar.figure, line.rstrip()))]
        if not lines:
            failed = next(
                (line for line in text.splitlines() if "FAILED" in line), "the command printed no such figure"
            )
            return Result(bar, (), " ".join(failed.split())[:160])
        if any("rejected" in found.string for found in lines):
            return Result(bar, (), "restless dense or peer run")
        values.append(min((float(found[1]) for found in lines), key=bar.margin))
    return Result(bar, tuple(values))
