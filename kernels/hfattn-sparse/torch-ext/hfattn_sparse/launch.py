"""Launching Triton kernels: the configuration of a device, and a recorder for compiling without one.

Every kernel is started through `launch`. Under `recording` nothing runs: the launches that a path would make are noted,
from meta tensors, so each of them can be compiled for a device that is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("launch_table.json")
# A second table whose rows come before those of `TABLE`: what `hf-attn tune` found on the user's own device.
TABLE_VARIABLE = "HF_ATTN_LAUNCH_TABLE"
Row = dict[str, Any]
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel start that was recorded.

    kernel: the Triton function; args: its positional arguments (meta tensors, numbers, None); meta: its constexpr
    arguments; options: num_warps and num_stages; target: the device it is meant for.
    """

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]
    options: dict[str, int]
    target: str


@dataclass
class _Recorder:
    target: str
    launches: list[Launch]
    lookups: list[tuple[str, str, int]] | None


_recorder: _Recorder | None = None
_forced: dict[str, dict[str, int]] = {}


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def target_of(device: torch.device) -> str:
    """Name of the architecture, as the table has it: "sm_90", "gfx942", "xpu", "interpreter"; or the recorded one."""
    if _recorder is not None:
        return _recorder.target
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return "interpreter" if device.type == "cpu" else device.type


def config(kernel: str, *, dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of a kernel, by name: those of the best matching row, see `find_row`."""
    name = str(dtype).removeprefix("torch.")
    if _recorder is not None and _recorder.lookups is not None:
        _recorder.lookups.append((kernel, name, head_dim))
    if kernel in _forced:
        return dict(_forced[kernel])
    return dict(find_row(kernel, target_of(device), name, head_dim)["config"])


def find_row(kernel: str, target: str, dtype: str, head_dim: int) -> Row:
    """The row of a kernel that serves a target, dtype ("bfloat16") and head dimension; ValueError without one.

    A row matches by `target` (exact, else its family "cuda" or "hip", else "*"), `dtype` (exact, else "*") and the
    smallest `head_dim` that is large enough; of two equal ones the user's own (HF_ATTN_LAUNCH_TABLE) is taken.
    """
    found = _lookup(kernel, target, dtype, head_dim, os.environ.get(TABLE_VARIABLE, ""))
    if found is None:
        raise ValueError(f"{TABLE.name} has no row of kernel {kernel!r} for {dtype} and head_dim {head_dim}")
    return found


@lru_cache(maxsize=512)
def _lookup(kernel: str, target: str, dtype: str, head_dim: int, own: str) -> Row | None:
    family = "hip" if target.startswith("gfx") else "cuda" if target.startswith("sm_") else "*"
    best = None
    for row in (read_table(own).get(kernel, []) if own else []) + table().get(kernel, []):
        if row["target"] not in (target, family, "*") or row["dtype"] not in (dtype, "*") or row["head_dim"] < head_dim:
            continue
        rank = ((target, family, "*").index(row["target"]), row["dtype"] == "*", row["head_dim"])
        if best is None or rank < best[0]:
            best = (rank, row)
    return None if best is None else best[1]


def table() -> dict[str, list[Row]]:
    """All rows of `launch_table.json`, by kernel."""
    return read_table(TABLE)


def read_table(path: str | Path) -> dict[str, list[Row]]:
    """All rows of a table, by kernel; ValueError with the path when the file is not one."""
    try:
        rows = json.loads(Path(path).read_text())
        complete = all(
            {"target", "dtype", "head_dim", "config"} <= row.keys() for of_kernel in rows.values() for row in of_kernel
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a launch table (see {TABLE_VARIABLE}): {error}") from error
    if not complete:
        raise ValueError(f"{path} is not a launch table: a row lacks one of target, dtype, head_dim and config")
    return rows


@contextmanager
def forced_config(**configs: dict[str, int]) -> Iterator[None]:
    """Use these configurations, by kernel name, instead of the table: for tuning and tests."""
    previous = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


@contextmanager
def recording(target: str, lookups: list[tuple[str, str, int]] | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside, as if on `target`, without running them. Call paths with meta tensors.

    `lookups` takes what is asked of `config`: (kernel name of the table, dtype, head_dim).
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("launches are already being recorded; close the outer recording() first")
    _recorder = _Recorder(target, [], lookups)
    try:
        yield _recorder.launches
    finally:
        _recorder = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start `kernel` on `grid` with positional `args`; `meta` are its constexprs, num_warps and num_stages.

    An empty grid starts nothing. The device of the first tensor is made current, as Triton launches on that one.
    """
    options = {name: meta.pop(name) for name in _OPTIONS if name in meta}
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, args, meta, options, _recorder.target))
        return
    first = next(a for a in args if isinstance(a, Tensor))
    guard = torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](*args, **meta, **options)
