"""The levels `op` and `mask` of `hf-attn bench`: what is to be run, and how one group of rows is measured."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_attn.bench.cases import Case, Checked, Op, Setting, check, ops_table
from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.record import Row, Store, environment
from hf_attn.bench.runner import NOISY, Figures, Function, best_dense, free_memory, measure, on_path, peak_memory
from hf_attn.bench.timing import Timing, interleaved, paired_ratio
from hf_attn.ops.backend import TRITON_OPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward", "decode")
PATHS = ("auto", "torch", "triton")
# Lengths that a memory probe chooses from; one dense call may take so many seconds.
_LENGTHS, _SECONDS = tuple(1 << n for n in range(9, 21)), {"cpu": 1.0, "cuda": 0.05}


@dataclass(frozen=True)
class Plan:
    """What a run covers.

    Args:
        device: "cpu" or "cuda".
        dtypes, lengths, densities, passes, paths: each with each; "flex", "natten" and "fla" are paths too.
        shape: heads and head dimension; tokens, dtype and device are set by the plan.
        block: tokens of a block.
        repeats: counted interleaved rounds.
        graphs: capture CUDA graphs where possible.
        run: a name that keeps rows apart from those of another run.
    """

    device: str
    dtypes: Sequence[str]
    lengths: Sequence[int]
    densities: Sequence[float] = (0.125,)
    passes: Sequence[str] = PASSES
    paths: Sequence[str] = ()
    shape: Shape = Shape()
    block: int = 128
    repeats: int = 7
    graphs: bool = True
    run: str = ""

    def setting(self, dtype: str, length: int, density: float, step: bool) -> Setting:
        sizes = {"q_len": 1 if step else length, "k_len": length, "dtype": DTYPES[dtype], "device": self.device}
        return Setting(replace(self.shape, **sizes), density, self.block)


@dataclass(frozen=True)
class Job:
    """Rows that share their inputs and the dense attention beside them.

    Args:
        row: the key without the variant.
        variants: variant -> (path of the ops, name of a rival of the case or None for the op itself).
        build: makes the case.
        absent: variants that cannot run here, and the status that says why.
    """

    row: Row
    variants: dict[str, tuple[str, str | None]]
    build: Callable[[], Case]
    absent: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        return [self.row | {"variant": name} for name in self.variants]


def paths_here(device: str) -> tuple[str, ...]:
    """Paths of the ops that run on this device."""
    return ("auto", "torch", "triton") if device.startswith("cuda") else ("auto", "torch")


def op_jobs(names: Iterable[str], plan: Plan) -> list[Job]:
    """Jobs of ops, short lengths first. Raises ValueError for an unknown op or path."""
    table = ops_table()
    names = list(names) or list(table)
    for name in names:
        if name not in table:
            raise ValueError(f"no op is called {name!r}; there are {', '.join(table)}")
    jobs = []
    for length in plan.lengths:
        for name in names:
            op = table[name]
            variants = _variants(name, op, plan)
            for dtype in plan.dtypes:
                for density in plan.densities if op.dense else (1.0,):
                    for kind in (p for p in op.passes if p in plan.passes):
                        setting = plan.setting(dtype, length, density, kind == "decode")
                        row = key_row("op", name, plan, setting, dtype, kind) | {
                            "requested": density if op.dense else ""
                        }
                        jobs.append(Job(row, variants, lambda op=op, setting=setting: op.build(setting)))
    return jobs


def _variants(name: str, op: Op, plan: Plan) -> dict[str, tuple[str, str | None]]:
    wanted = plan.paths or (*paths_here(plan.device), *op.backends)
    known = {*PATHS, "flex", "natten", "fla"}
    if set(wanted) - known:
        raise ValueError(f"unknown paths {sorted(set(wanted) - known)}; allowed: {', '.join(sorted(known))}")
    found: dict[str, tuple[str, str | None]] = {}
    for path in wanted:
        if path in op.backends:
            if plan.paths or (importlib.util.find_spec(op.backends[path]) and path != "flex"):
                found[path] = ("auto", path)
        elif path in ("auto", "torch") or (path == "triton" and name in TRITON_OPS):
            found[path] = (path, None)
    return found


def key_row(level: str, name: str, plan: Plan, setting: Setting, dtype: str, kind: str) -> Row:
    """The key of a row, without its variant."""
    shape = setting.shape
    sizes = f"B1 Hq{shape.heads} Hkv{shape.kv_heads} D{shape.head_dim} Nq{shape.q_len}"
    return environment(plan.device, plan.run) | {
        "level": level, "name": name, "dtype": dtype, "pass": kind, "length": setting.length, "shape": sizes,
        "requested": setting.density, "options": f"block={setting.block}",
    }  # fmt: skip


def run_jobs(
    jobs: Sequence[Job], plan: Plan, store: Store, progress: Callable[[int, int], None] = lambda *_: None
) -> Iterator[Row]:
    """Measure what the store does not have yet, and yield every new row once it is stored."""
    weights = [job.row["length"] for job in jobs]
    done = 0
    for job, weight in zip(jobs, weights, strict=True):
        if not all(store.has(row) for row in job.rows()):
            for row in run_job(job, plan):
                if not store.has(row):
                    store.add(row)
                    yield row
        done += weight
        progress(done, sum(weights))


def run_job(job: Job, plan: Plan) -> list[Row]:
    """The rows of a job; what cannot run or computes wrongly has a status that says so, and no times."""
    torch.manual_seed(0)
    torch.set_num_threads(job.row["threads"])
    kind = job.row["pass"]
    try:
        case = job.build()
    except Exception as error:  # one case that cannot be built must not end the run
        return [row | {"status": _reason(error)} for row in job.rows()]
    found: dict[str, Row] = {}
    functions: dict[str, Function] = {}
    for variant, (path, rival) in job.variants.items():
        if variant in job.absent:
            found[variant] = {"status": job.absent[variant]}
            continue
        run = case.run if rival is None else case.rivals.get(rival)
        try:
            if run is None:
                raise ValueError(f"{rival} does not run this case")
            checked = check(case, run, path, backward=kind == "backward")
            found[variant] = judged(checked)
            if checked.passed:
                with_path = on_path(path, case.backward(run) if kind == "backward" else case.forward(run))
                with_path()
                functions[variant] = with_path
        except Exception as error:  # the others go on
            found[variant] = {"status": _reason(error)}
    if functions:
        timed = time_case(case, functions, plan, kind)
        found = {name: row | timed.get(name, {}) for name, row in found.items()}
    del functions, case
    _release(plan.device)
    return [job.row | {"variant": name, "repeats": plan.repeats} | row for name, row in found.items()]


def judged(checked: Checked) -> Row:
    """The cells of a check."""
    status = "ok" if checked.passed else "check failed: no speed"
    return {"status": status, "error": checked.error, "allowed": checked.allowed}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"cannot run: {type(error).__name__}: {text[:200]}"


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def time_case(case: Case, functions: dict[str, Function], plan: Plan, kind: str) -> dict[str, Row]:
    """Times of functions that computed rightly, the best dense attention and what a case needs besides, interleaved."""
    backward = kind == "backward"
    runs = dict(functions)
    dense_name = None
    if case.dense is not None:
        dense_name, runs["dense"] = best_dense(*case.dense, causal=case.causal, backward=backward)
    for name, function in (("select", case.select), ("permute", case.permute)):
        if function is not None:
            runs[name] = function
            function()
    builds = {name: _milliseconds(case.builds[name], plan.device) for name in functions if name in case.builds}
    times = measure(runs, plan.device, repeats=plan.repeats, graphs=plan.graphs)
    extra = {name: times[name] for name in ("select", "permute") if name in times}
    dense = times.get("dense")
    peak = peak_memory(runs["dense"], plan.device) if dense else None
    rows = {}
    peers = [name for name in functions if name in case.rivals]
    for name, function in functions.items():
        rows[name] = figures_row(times[name], dense, dense_name, case.density, extra)
        if name not in peers and len(peers) == 1:
            theirs = times[peers[0]].timing
            rows[name]["over_peer"] = paired_ratio(theirs, times[name].timing)
            if theirs.spread > NOISY and rows[name]["status"] == "ok":
                rows[name]["status"] = f"rejected: peer spread {theirs.spread:.0%}"
        if name in builds:
            rows[name]["build_ms"] = builds[name]
        rows[name]["peak_mib"] = peak_memory(function, plan.device) / 2**20
        if peak is not None:
            rows[name]["dense_peak_mib"] = peak / 2**20
    return rows


def figures_row(
    own: Figures, dense: Figures | None, dense_name: str | None, density: float | None, extra: dict[str, Figures]
) -> Row:
    """The cells of one function's times, beside the dense ones of the same rounds."""
    row: Row = {"ms": own.timing.median * 1e3, "spread": own.timing.spread, "timer": own.timer, "status": "ok"}
    row |= {f"{name}_ms": figures.timing.median * 1e3 for name, figures in extra.items()}
    row["density"] = density
    if own.eager is not None:
        row["eager_ms"] = own.eager.median * 1e3
    if dense is None:
        return row
    # A function that could not be captured is compared with dense attention that is launched as it is.
    base = dense.timing if own.eager is not None or dense.eager is None else dense.eager
    total = _sum(own.timing, *(figures.timing for figures in extra.values()))
    ratio = paired_ratio(base, own.timing)
    row |= {
        "dense": dense_name, "dense_ms": base.median * 1e3, "dense_spread": base.spread, "speedup": ratio,
        "speedup_with_selection": paired_ratio(base, total),
    }  # fmt: skip
    if dense.eager is not None:
        row["dense_eager_ms"] = dense.eager.median * 1e3
    if density is not None:
        row["limit"] = ratio * density
    if base.spread > NOISY:
        row["status"] = f"rejected: dense spread {base.spread:.0%}"
    return row


def _milliseconds(function: Function, device: str) -> float:
    """Of a few calls on their own: what happens once is not worth a place in the rounds."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    return interleaved({"": function}, repeats=3, synchronize=wait)[""].median * 1e3


def _sum(*timings: Timing) -> Timing:
    return Timing(tuple(sum(samples) for samples in zip(*(t.samples for t in timings), strict=True)))


def fitting_lengths(device: str, shape: Shape, dtypes: Sequence[str], count: int = 3) -> list[int]:
    """The longest lengths, each twice the one before, that a case has room for in half of the free memory.

    A case holds about twenty tensors of the size of the query, and fp64 scores of the sampled rows. One dense call must
    take less than a second (on a GPU 50 ms), estimated from a short one.
    """
    size = max(DTYPES[name].itemsize for name in dtypes)
    per_token = 20 * shape.heads * shape.head_dim * size + 4 * 64 * shape.heads * 8
    room = free_memory(device) / 2
    probe = replace(shape, q_len=1024, k_len=1024, dtype=DTYPES[dtypes[0]], device=device)
    dense = best_dense(*probe.tensors(), causal=True, backward=False)[1]
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds = interleaved({"dense": dense}, repeats=3, synchronize=wait)["dense"].median
    fitting = [
        n
        for n in _LENGTHS
        if n * per_token <= room
        and seconds * (n / 1024) ** 2 <= _SECONDS["cuda" if device.startswith("cuda") else "cpu"]
    ]
    return fitting[-count:] or [_LENGTHS[0]]


def summary(row: Row) -> dict[str, Any]:
    """The cells of a row that a table in a terminal has room for, as text."""

    def number(name: str, form: str) -> str:
        value = row.get(name)
        return "" if value is None else format(value, form)

    ok = row["status"] == "ok"
    return {
        "case": row["name"], "variant": row["variant"], "dtype": row["dtype"], "pass": row["pass"],
        "N": f"{row['length']}", "density": number("density", ".3f"), "ms": number("ms", ".3f"),
        "spread": number("spread", ".0%"), "eager": number("eager_ms", ".3f"), "dense": number("dense_ms", ".3f"),
        "select": number("select_ms", ".3f"), "permute": number("permute_ms", ".3f"),
        "build": number("build_ms", ".2f"), "speed-up": number("speedup", ".2f"), "/peer": number("over_peer", ".2f"),
        "limit": number("limit", ".0%"), "MiB": number("peak_mib", ".1f"),
        "note": (row.get("dense") or "") if ok else row["status"],
    }  # fmt: skip
