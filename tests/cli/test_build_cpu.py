"""`hf-attn build-cpu`: compile, check, tell; and what a user sees where that does not work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_attn
from hf_attn.bench import cpu_kernel
from hf_attn.cli.app import app
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.native import library
from tests.integrations.transformers.tiny import build as model

WIDE = {"COLUMNS": "400"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path / "cache"
    library._load.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def build_cpu(*arguments: str):
    return CliRunner().invoke(app, ["build-cpu", *arguments], env=WIDE)


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("false", "false -std=c..17 .*failed with status 1 and said nothing. It takes a compiler with C..17"),
        ("no-such-compiler", "CXX='no-such-compiler' is not a program; install one .*Everything works without it"),
    ],
)
def test_without_a_compiler_it_ends_in_one_line(cxx, message, cache, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    result = build_cpu()
    assert result.exit_code == 1 and re.search(f"^error: {message}", result.output), result.output
    assert len(result.output.strip().splitlines()) == 1


def test_what_a_compiler_says_is_shown(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo 'tiles.cpp:7: [x] is wrong' >&2; exit 4"))
    result = build_cpu()
    assert result.exit_code == 1 and "\ntiles.cpp:7: [x] is wrong\n" in result.output
    assert "failed with status 4:" in result.output and not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", "true")
    result = build_cpu()
    assert result.exit_code == 1 and "cannot be written" in result.output and "set HF_ATTN_CACHE" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_force_and_remove_exclude_each_other(cache):
    result = build_cpu("--force", "--remove")
    assert result.exit_code == 2 and "give one of them" in result.output


def test_remove(cache):
    assert f"nothing is built in {cache}" in build_cpu("--remove").output
    cache.mkdir()
    library.built_file().write_text("")
    (cache / "mine").write_text("")
    result = build_cpu("--remove")
    assert result.exit_code == 0 and f"deleted {library.built_file()}" in result.output
    assert [path.name for path in cache.iterdir()] == ["mine"]


# Stand-ins for what a broken compiler makes of the sources: functions that do nothing, and one that ends the process.
WRONG = {
    "wrong results": ("return 0;", r"its torch.float32 results err (nan|[\d.e+]+) times as much"),
    "a crash": ("__builtin_trap();", "it ended with SIG(ILL|TRAP)"),
}


@pytest.mark.needs_cxx
@pytest.mark.parametrize("name", ["wrong results", pytest.param("a crash", marks=pytest.mark.slow)])
def test_a_kernel_that_fails_its_check_is_deleted(name, cache, tmp_path, monkeypatch):
    body, message = WRONG[name]
    names = set(re.findall(r"\bhfa_\w+", Path(library.__file__).read_text()))
    code = "".join(f'extern "C" int {one}(...) {{ {body} }} ' for one in sorted(names))
    out = 'for last; do :; done; out="$last"'
    script = f"{out}\necho '{code}' | c++ -shared -fPIC -x c++ - -o \"$out\""
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    result = build_cpu()
    assert result.exit_code == 1, result.output
    assert "failed its check and was deleted" in result.output and re.search(message, result.output), result.output
    assert not list(cache.iterdir()) and "Traceback" not in result.output


@pytest.mark.needs_cxx
def test_a_build_is_checked_and_described(native_folder, monkeypatch):
    """Of the library that the other tests use: compiling takes long."""
    monkeypatch.setenv("HF_ATTN_CACHE", str(native_folder))
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")  # which must not decide what the check runs
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = build_cpu()
    assert result.exit_code == 0, result.output
    assert f"{library.built_file()} (was there already; --force compiles it anew)" in result.output
    assert "bfloat16 products: " + ("on AMX tiles" if library.has_matrix_tiles() else "in float32") in result.output
    for dtype in ("float32", "bfloat16"):
        speeds = rf"{dtype}: [\d.]+ ms, [\d.]+x the speed of the torch path, [\d.]+x dense attention"
        assert re.search(speeds, result.output), result.output
    assert library.built_file().is_file()


@pytest.mark.slow
@pytest.mark.needs_cxx
def test_compiling_twice_and_anew(cache):
    first, second = build_cpu(), build_cpu()
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert "(compiled in " in first.output and "(was there already" in second.output
    assert "(compiled in " in build_cpu("--force").output
    assert [path.name for path in cache.iterdir()] == [library.built_file().name]


@pytest.mark.needs_cxx
@pytest.mark.parametrize("dtype", cpu_kernel.DTYPES, ids=str)
def test_the_check_lets_right_results_through_and_no_wrong_ones(dtype, native_kernel):
    assert 0 < cpu_kernel.worst(dtype) <= 1
    for op in ("block_sparse_attention", "routed_block_attention"):
        assert path_counts()[f"{op} | torch: native"] == len(cpu_kernel.CHECKS)
    right = torch.randn(64, dtype=torch.float64)
    plain = right.to(dtype)
    assert cpu_kernel.error(plain, plain, right) <= 0.5
    assert cpu_kernel.error(plain * (1 + 8 * torch.finfo(dtype).eps), plain, right) > 1
    assert not cpu_kernel.error(plain.clone().index_fill(0, torch.tensor([3]), float("nan")), plain, right) <= 1


def test_the_check_needs_a_kernel_that_loads(cache):
    with pytest.raises(SystemExit, match="not built: run hf-attn build-cpu"):
        cpu_kernel.main([])
    cache.mkdir()
    library.built_file().write_text("no machine code")
    library._load.cache_clear()
    with pytest.raises(SystemExit, match="is not used, for it cannot be loaded"):
        cpu_kernel.main([])


def test_doctor_says_that_it_is_not_built():
    report = str(hf_attn.doctor(hf_attn.apply(model("llama"), "streaming")))
    assert "CPU kernel: not built; hf-attn build-cpu compiles it once" in report


@pytest.mark.needs_cxx
def test_doctor_says_that_it_is_built(native_kernel, monkeypatch):
    tiles = "AMX" if library.has_matrix_tiles() else "float32 arithmetic, no AMX"
    llama = hf_attn.apply(model("llama"), "streaming")
    assert f"CPU kernel: built ({tiles})\n" in f"{hf_attn.doctor(llama)}\n"
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert f"CPU kernel: built ({tiles}), kept off by HF_ATTN_BACKEND=torch" in str(hf_attn.doctor(llama))
