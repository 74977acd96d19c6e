"""Rows of measurements: what they are keyed by, and one file that a run appends to and takes up again."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import hf_attn
from hf_attn.bench.timing import machine_load
from hf_attn.ops.hfattn_sparse import native

Row = dict[str, Any]
# A row is found again by these; everything else is what was measured.
KEY = (
    "run", "level", "name", "variant", "dtype", "pass", "length", "shape", "requested", "options", "threads",
    "hardware", "torch", "triton", "transformers", "hf_attn", "git",
)  # fmt: skip
# Milliseconds are medians, a spread is the interquartile range over the median, sizes are MiB. `over_peer` is the time
# of the peer over ours.
RESULTS = (
    "status", "ms", "spread", "eager_ms", "dense", "dense_ms", "dense_spread", "dense_eager_ms", "speedup", "density",
    "limit", "select_ms", "permute_ms", "build_ms", "speedup_with_selection", "over_peer", "peak_mib",
    "dense_peak_mib", "error", "allowed", "repeats", "timer", "load", "date",
)  # fmt: skip
COLUMNS = KEY + RESULTS
RESULTS_FOLDER = Path(__file__).parent / "results"


def version_of(package: str) -> str:
    """Installed version, empty when it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


KERNEL_WORDS = " + CPU kernel"
# What a commit must touch to make figures stale: the code, not its results and not the documentation.
_MEASURED = ("hf_attn", "kernels", ":!hf_attn/bench/results", ":!hf_attn/cli")


@cache
def git_version() -> str:
    """The last commit of the source checkout this package is imported from that changed code which is measured.

    With "-dirty" behind it when such code differs from it; empty for an installed package.
    """
    folder = Path(hf_attn.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return ""
    try:
        commit = _git(folder, "log", "-1", "--format=%h", "--", *_MEASURED)
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--", *_MEASURED) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", os.fspath(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


@cache
def processor_name() -> str:
    """What the kernel calls the CPU, and how many of them this process sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} x {os.cpu_count()}"


def hardware(device: str) -> str:
    """Name of the device that is measured; on a CPU also whether the compiled kernel is built and not kept off."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    used = native.available() and os.environ.get("HF_ATTN_BACKEND", "").strip().lower() in ("", "auto", "native")
    return processor_name() + (KERNEL_WORDS + " (AMX)" * native.has_matrix_tiles() if used else "")


def environment(device: str, run: str = "") -> Row:
    """The part of the key that is the same for all rows of a run."""
    return {
        "run": run, "threads": torch.get_num_threads(), "hardware": hardware(device), "torch": torch.__version__,
        "triton": version_of("triton"), "transformers": version_of("transformers"), "hf_attn": hf_attn.__version__,
        "git": git_version(),
    }  # fmt: skip


def key_of(row: Row) -> tuple[str, ...]:
    """What tells rows apart, as text: files hold nothing else."""
    return tuple(_text(row.get(name)) for name in KEY)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


class Store:
    """A file of rows, .csv or .jsonl; rows that it has are not measured again.

    Args:
        path: is created with its folders at the first row.
        again: measure everything; new rows stand behind the old ones, and the last row of a key counts.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"the output must end in .csv or .jsonl, got {path}")
        self.path = path
        self._seen = set() if again or not path.exists() else {key_of(row) for row in read_rows([path])}

    def has(self, row: Row) -> bool:
        return key_of(row) in self._seen

    def add(self, row: Row) -> None:
        """Append one row, on disk before this returns."""
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"a row has no columns {sorted(unknown)}")
        row = {"load": machine_load(), "date": datetime.date.today().isoformat(), **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as stream:
            if self.path.suffix == ".jsonl":
                stream.write(json.dumps({name: row.get(name) for name in COLUMNS}) + "\n")
            else:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow({name: _text(row.get(name)) for name in COLUMNS})
        self._seen.add(key_of(row))


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of files, the last of every key; numbers are floats, empty cells are None.

    Raises ValueError, naming the file, for one that is not a table of this benchmark; OSError for a missing one.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file of results: {path}")
        try:
            with path.open(newline="") as stream:
                if path.suffix == ".jsonl":
                    found = [json.loads(line) for line in stream if line.strip()]
                else:
                    reader = csv.DictReader(stream, strict=True)
                    found = list(reader)
                    if set(reader.fieldnames or ()) != set(COLUMNS):
                        raise ValueError("its columns are not those of hf-attn bench")
            for row in found:
                if not isinstance(row, dict) or set(row) != set(COLUMNS):
                    raise ValueError("a row has other columns than those of hf-attn bench")
                row = {name: _value(name, row[name]) for name in COLUMNS}
                rows[key_of(row)] = row
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of results: {error}; give another --output, or move it") from error
    return list(rows.values())


def _value(name: str, value: Any) -> Any:
    if value is None or value == "":
        return None
    words = ("status", "dense", "timer", "load", "date")
    return float(value) if name in RESULTS and name not in words else str(value)


def committed_results() -> list[Path]:
    """The files of results that come with the package."""
    return sorted(RESULTS_FOLDER.glob("*.csv"))
