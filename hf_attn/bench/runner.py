"""What every level of `hf-attn bench` shares: paths, clocks, CUDA graphs, memory, the best dense attention."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.bench.routed_speed import peak_bytes
from hf_attn.bench.timing import Timing, graph_of, interleaved

Function = Callable[[], Any]
# Above this spread of the dense rounds a ratio says more about the machine than about the code.
NOISY = 0.15
# Back ends of SDPA on CUDA.
KINDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
# A sample repeats its function until the clock and the launch of a graph no longer show in it, in seconds.
_SAMPLE = {"cpu": 1e-3, "cuda": 4e-3}
_VARIABLE = "HF_ATTN_BACKEND"


@contextmanager
def backend(path: str) -> Iterator[None]:
    """Ops on one path inside the `with` block: "auto", "torch", "triton" or "reference"."""
    before = os.environ.pop(_VARIABLE, None)
    if path != "auto":
        os.environ[_VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


def on_path(path: str, function: Function) -> Function:
    """The function on a path of the ops."""

    def run() -> Any:
        with backend(path):
            return function()

    return run


@dataclass(frozen=True)
class Figures:
    """Times of one function: from a CUDA graph where one could be captured, and launched one by one."""

    timing: Timing
    eager: Timing | None
    timer: str


def measure(
    functions: dict[str, Function],
    device: str,
    *,
    repeats: int,
    graphs: bool = True,
    launches: bool = True,
    sample: float | None = None,
) -> dict[str, Figures]:
    """Interleaved times of functions, all of one round from the same machine.

    Args:
        functions: name -> function; each has run once already.
        repeats: counted rounds.
        graphs: on CUDA also capture each function; its `timing` is then that of the replays.
        launches: also time functions that were captured as they are launched.
        sample: seconds that a sample takes at least, by repeating its function; default 1 ms, on CUDA 4 ms.
    """
    cuda = device.startswith("cuda")
    runs: dict[tuple[str, str], Function] = {}
    for name, function in functions.items():
        replay = graph_of(function) if cuda and graphs else None
        if replay is not None:
            runs[name, "graph"] = replay
        if replay is None or launches:
            runs[name, "eager"] = function
    wait = torch.cuda.synchronize if cuda else lambda: None
    pilot = interleaved(runs, repeats=1, synchronize=wait)
    least = sample or _SAMPLE["cuda" if cuda else "cpu"]
    counts = {key: max(1, round(least / t.median)) for key, t in pilot.items()}
    repeated = {key: partial(_repeat, run, counts[key]) for key, run in runs.items()}
    found = interleaved(repeated, repeats=repeats, warmup=1, synchronize=wait)
    times = {key: Timing(tuple(s / counts[key] for s in t.samples)) for key, t in found.items()}
    result = {}
    for name in functions:
        if (name, "graph") in times:
            result[name] = Figures(times[name, "graph"], times.get((name, "eager")), "cuda graph")
        else:
            result[name] = Figures(times[name, "eager"], None, "wall, device synchronized" if cuda else "wall")
    return result


def _repeat(function: Function, count: int) -> None:
    for _ in range(count):
        function()


def peak_memory(function: Function, device: str) -> int:
    """Most bytes that torch held at one time during a call above what it held before."""
    if not device.startswith("cuda"):
        with _quiet_errors():
            return peak_bytes(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


@contextmanager
def _quiet_errors() -> Iterator[None]:
    """Standard error of the process to nowhere: torch's profiler writes lines there past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_memory(device: str) -> int:
    """Bytes that new tensors can take: of the GPU, or of the machine and the group this process runs in."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


# -- dense attention ---------------------------------------------------------------------------------------------------


def best_dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, backward: bool) -> tuple[str, Function]:
    """The fastest dense attention of these tensors that torch has on this device, of a few quick rounds, and its name.

    With `backward` a call is a forward and a backward. A single query is tried with the heads of a group as rows too.
    """
    candidates = dense_candidates(query, key, value, causal=causal, backward=backward)
    device = query.device.type
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = interleaved(candidates, repeats=3, synchronize=wait)
    name = min(times, key=lambda n: times[n].median)
    return name, candidates[name]


def dense_candidates(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, backward: bool, kinds: Sequence[str] = KINDS
) -> dict[str, Function]:
    """Every dense attention that runs: layouts (grouped, expanded, folded) times back ends of SDPA on CUDA."""
    group = query.shape[1] // key.shape[1]
    single = query.shape[2] == 1
    causal = causal and not single
    layouts: dict[str, tuple[list[Tensor], dict[str, Any]]] = {}
    if group == 1:
        layouts["sdpa"] = [query, key, value], {}
    else:
        layouts["sdpa grouped"] = [query, key, value], {"enable_gqa": True}
        layouts["sdpa expanded"] = [query, *(x.repeat_interleave(group, 1) for x in (key, value))], {}
        if single:
            layouts["sdpa folded"] = [query.unflatten(1, (-1, group)).squeeze(3), key, value], {}
    names = {"": None}
    if query.is_cuda:
        names = {f" {kind.split('_')[0].lower()}": getattr(SDPBackend, kind) for kind in kinds}
    found: dict[str, Function] = {}
    for layout, (tensors, options) in layouts.items():
        for kind, choice in names.items():
            run = _dense_call(tensors, choice, causal, backward, options)
            if _runs(run):
                found[layout + kind] = run
    if not found:
        (layout, (tensors, options)), *_ = layouts.items()
        found[f"{layout} any"] = _dense_call(tensors, None, causal, backward, options)
    return found


def _dense_call(
    tensors: list[Tensor], kind: SDPBackend | None, causal: bool, backward: bool, options: dict[str, Any]
) -> Function:
    leaves = [x.detach().requires_grad_(backward) for x in tensors]
    shape = (*tensors[0].shape[:3], tensors[2].shape[3])
    grad = torch.randn(shape, dtype=tensors[0].dtype, device=tensors[0].device) if backward else None

    def run() -> Any:
        with nullcontext() if kind is None else sdpa_kernel(kind), torch.set_grad_enabled(backward):
            out = scaled_dot_product_attention(*leaves, is_causal=causal, **options)
            return torch.autograd.grad(out, leaves, grad) if backward else out

    return run


def _runs(function: Function) -> bool:
    """Whether a back end takes these tensors; the reasons SDPA warns about are of no use here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except RuntimeError:  # torch.OutOfMemoryError is one
            return False
    return True
