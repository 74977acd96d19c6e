"""Every kernel and configuration compiles for sm_80, sm_90 and gfx942, fits its shared memory and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn.ops.hfattn_sparse import aot, launch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2


def compile_all(cache: Path, *options: str) -> tuple[list[dict], list[dict]]:
    """The report of `aot_calls` on all targets: programs, and rows of the table in use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.triton_paths.aot_calls", *options]
    running = [
        subprocess.Popen(
            [*command, "--shard", f"{part}/{PROCESSES}"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for part in range(PROCESSES)
    ]
    lines = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        lines += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [line for line in lines if "kernel" in line], [line for line in lines if "rows" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    return compile_all(tmp_path_factory.mktemp("triton"))


def check(programs: list[dict]) -> None:
    assert {p["target"] for p in programs} == set(aot.SHARED_LIMITS)
    assert not [p for p in programs if "error" in p]
    too_big = [p for p in programs if p["shared"] > aot.SHARED_LIMITS[p["target"]]]
    assert not too_big, too_big
    near = [p for p in programs if p["target"] == "sm_90" and p["head_dim"] <= 128]
    spilling = [p for p in near if p["spills"] > aot.MEASURED_SPILLS * p["measured"]]
    assert not spilling, spilling
    assert not [error for p in programs for error in p["specialisation"]]


def test_all_kernels_compile_fit_and_do_not_spill(report):
    check(report[0])


def test_the_limits_are_those_of_the_hardware():
    assert aot.SHARED_LIMITS == {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}


ALL_TYPES = ("bfloat16", "float16", "float32")


def check_rows(lines: list[dict], dtypes: tuple[str, ...] = ALL_TYPES, largest: int = 256) -> None:
    """Every row that serves a target, for one of the `dtypes` and head dimensions up to `largest`, was in use there."""
    for line in lines:
        family = ("*", "hip" if line["target"].startswith("gfx") else "cuda", line["target"])
        for kernel, rows in launch.table().items():
            for row in rows:
                if row["head_dim"] > largest or row["target"] not in family:
                    continue
                if not overridden(kernel, row, line["target"], dtypes):
                    assert {"kernel": kernel, **row} in line["rows"], f"{kernel} {row} on {line['target']}"


def test_every_row_of_the_table_was_compiled(report):
    check_rows([line for line in report[1] if line["target"] == "sm_90"], ("bfloat16",), 128)


def overridden(kernel: str, row: dict, target: str, dtypes: tuple[str, ...]) -> bool:
    """Whether a more exact row of the target serves all of the `dtypes` that this one says it serves."""
    dtypes = tuple(t for t in dtypes if row["dtype"] in ("*", t))
    smaller = [r["head_dim"] for r in launch.table()[kernel] if r["head_dim"] < row["head_dim"]]
    sizes = (max(smaller, default=0) + 1, row["head_dim"])
    return all(launch.find_row(kernel, target, dtype, size) != row for dtype in dtypes for size in sizes)


def test_kernels_of_all_ops_are_there(report):
    """Each op with a Triton path has its kernels in the report."""
    from hf_attn.ops.backend import TRITON_OPS

    names = {"select_blocks": "select blocks", "block_sparse_attention": "block-sparse attention"}
    names |= {"select_routes": "select routes", "routed_block_attention": "routed attention"}
    names |= {"page_statistics": "page statistics", "page_scores": "page scores", "paged_attention": "paged attention"}
    names |= {"sink_window_attention": "sink-window attention", "pyramid_attention": "pyramid attention"}
    names |= {"quantized_block_attention": "quantised attention", "head_routed_attention": "head-routed attention"}
    names |= {"linear_attention": "linear attention", "neighborhood_attention": "neighborhood attention"}
    assert TRITON_OPS <= names.keys()
    for op in TRITON_OPS:
        assert [p for p in report[0] if p["origin"].startswith(names[op])], op


@pytest.mark.slow
def test_the_product_of_types_sizes_and_layouts(tmp_path):
    programs, lines = compile_all(tmp_path, "--wide")
    check(programs)
    check_rows(lines)


def test_compiling_in_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET was unset"):
        aot.specialise(launch.Launch(None, (), {}, {}, "sm_90"))


def test_the_log_of_the_assembler_is_read():
    """Spills and an unknown log: what a healthy build never shows."""
    log = "0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nptxas info: Used 255 registers, 40 bytes"
    assert aot._nvidia_resources(log) == (255, 20)
    with pytest.raises(RuntimeError, match="did not say how many registers"):
        aot._nvidia_resources("nothing")
    assembly = ".vgpr_count:     128\n .vgpr_spill_count: 3\n .sgpr_spill_count: 9"
    assert aot._amd_resources(assembly) == (128, 3)
    built = aot.Compiled("k", "sm_90", 300_000, 255, 20, {"BLOCK_M": 64}, {"num_warps": 4})
    assert aot.problem(built) == "needs 300000 bytes of shared memory, sm_90 has 232448"
    assert str(built) == "k on sm_90 (BLOCK_M=64 num_warps=4)"
