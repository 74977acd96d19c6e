"""`hf-attn bench op` and `mask`: rows, the check before the clock, resumption, errors in one line."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from hf_attn import ops
from hf_attn.bench import levels, runner
from hf_attn.bench.cases import Setting, check, ops_table
from hf_attn.bench.kernel_calls import Shape
from hf_attn.bench.masks import MASKS, build
from hf_attn.bench.record import COLUMNS, KEY, Store, committed_results, read_rows
from hf_attn.bench.runner import Figures
from hf_attn.bench.timing import Timing
from hf_attn.cli.app import app

SMALL = ["--lengths", "128", "--dtype", "fp32", "--block", "16", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
# Helpers of the ops in the table: choices of blocks, statistics, parts of a form, and dense attention itself.
PARTS = {
    "ChunkWeights", "MemoryStates", "antidiagonal_importance", "assign_levels", "block_scores", "choose_path",
    "dense_attention", "document_scores", "key_block_major", "memory_coefficients", "merge_attentions", "na_av",
    "na_qk", "neighborhood_mask", "page_scores", "page_statistics", "path_counts", "pyramid_pairs", "read_memory",
    "reset_path_counts", "sampled_importance", "select_blocks", "select_levels", "select_pages",
    "select_pooled_routes", "select_regions", "select_routes", "similarity_cap",
}  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "250"})


def setting(step: bool = False, dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(Shape(dtype, 16, q_len=1 if step else 256, k_len=256, heads=4, kv_heads=2, device="cpu"), 0.25, 32)


def test_every_public_op_is_in_the_table():
    assert set(ops_table()) | PARTS == set(ops.__all__) and not set(ops_table()) & PARTS


@pytest.mark.parametrize("name", ops_table())
def test_cases_pass_their_check(name):
    op = ops_table()[name]
    for kind in op.passes:
        torch.manual_seed(0)
        case = op.build(setting(kind == "decode"))
        found = check(case, case.run, "torch", backward=kind == "backward")
        assert found.passed, (kind, found)
        assert case.density is None or 0 < case.density <= 1


@pytest.mark.parametrize("name", MASKS)
def test_masks_pass_their_check(name):
    torch.manual_seed(0)
    case = build(MASKS[name], setting())
    assert check(case, case.run, "torch", backward=True).passed and 0 < case.density <= 1


def test_a_check_sees_a_wrong_row_and_a_wrong_gradient():
    case = ops_table()["block_sparse_attention"].build(setting())

    def late(*leaves):
        out = case.run(*leaves)
        return torch.cat([out[:, :, :-1], out[:, :, -1:] * 1.01], 2)

    def sloppy(query, key, value):
        return case.run(query, key, value.detach() + (value - value.detach()) * 1.01)

    assert not check(case, late, "torch", backward=False).passed
    assert (
        check(case, sloppy, "torch", backward=False).passed and not check(case, sloppy, "torch", backward=True).passed
    )


def test_op_command_writes_rows_and_takes_them_up_again(tmp_path, monkeypatch):
    file = tmp_path / "new" / "rows.csv"
    arguments = ["op", "block_sparse_attention", "key_convolution", *SMALL, "--density", "0.5", "--output", file]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "load average" in result.output
    rows = read_rows([file])
    assert len(rows) == 10 and f"{len(rows)} new rows" in result.output
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith("rejected: dense spread"), row
        assert row["ms"] > 0 and row["spread"] >= 0 and row["repeats"] == 7 and row["error"] <= row["allowed"]
        if row["name"] == "block_sparse_attention":
            assert row["speedup"] > 0 and row["limit"] == pytest.approx(row["speedup"] * row["density"])
            assert row["select_ms"] > 0 and row["permute_ms"] > 0 and row["dense"].startswith("sdpa")
            assert row["speedup_with_selection"] < row["speedup"]
            assert (row["status"] == "ok") == (row["dense_spread"] <= runner.NOISY)
        else:
            assert row["speedup"] is None and row["limit"] is None and row["density"] is None
    assert {row["pass"] for row in rows} == {"forward", "backward", "decode"}

    monkeypatch.setattr(levels, "run_job", lambda job, plan: pytest.fail("measured again"))
    assert "0 new rows" in run(*arguments).output
    monkeypatch.undo()
    more = run(*arguments[:2], *SMALL, "--density", "0.5", "--passes", "forward", "--again", "--output", file)
    assert "2 new rows" in more.output and len(read_rows([file])) == 10
    assert len(file.read_text().splitlines()) == 13


def test_a_wrong_op_has_no_speed(tmp_path, monkeypatch):
    original = ops.block_sparse_attention
    monkeypatch.setattr(ops, "block_sparse_attention", lambda *a, **k: original(*a, **k) * 1.01)
    result = run("op", "block_sparse_attention", *SMALL, "--passes", "forward", "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 0 and "check failed: no speed" in result.output
    for row in read_rows([tmp_path / "rows.jsonl"]):
        assert row["status"] == "check failed: no speed" and row["error"] > row["allowed"]
        assert row["ms"] is None and row["speedup"] is None and row["limit"] is None


def test_what_cannot_run_says_so_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["--passes", "decode", "--path", "triton", "torch", "--output", tmp_path / "rows.csv"]
    assert run("op", "block_sparse_attention", *SMALL, *arguments).exit_code == 0
    rows = {row["variant"]: row for row in read_rows([tmp_path / "rows.csv"])}
    assert rows["triton"]["status"].startswith("cannot run: RuntimeError") and rows["triton"]["ms"] is None
    assert rows["torch"]["ms"] > 0


def test_a_noisy_dense_run_rejects_the_row():
    def figures(*samples):
        return Figures(Timing(samples), None, "wall")

    quiet = levels.figures_row(figures(1, 1, 1, 1), figures(2, 2, 2, 2), "sdpa", 0.25, {"select": figures(1, 1, 1, 1)})
    assert quiet["status"] == "ok" and quiet["speedup"] == 2 and quiet["limit"] == 0.5
    assert quiet["speedup_with_selection"] == 1 and quiet["select_ms"] == 1000
    noisy = levels.figures_row(figures(1, 1, 1, 1), figures(1, 1.8, 2.2, 3), "sdpa", 0.25, {})
    assert noisy["status"] == "rejected: dense spread 20%"


def test_captured_functions_are_compared_with_captured_dense_attention():
    def figures(graph, eager):
        return Figures(Timing((graph,) * 4), Timing((eager,) * 4), "cuda graph")

    row = levels.figures_row(figures(1, 3), figures(2, 9), "sdpa flash", 0.5, {})
    assert row["speedup"] == 2 and row["eager_ms"] == 3000 and row["dense_eager_ms"] == 9000
    row = levels.figures_row(Figures(Timing((3,) * 4), None, "wall"), figures(2, 9), "sdpa flash", 0.5, {})
    assert row["speedup"] == 3 and row["dense_ms"] == 9000


def test_mask_command(tmp_path):
    result = run("mask", "window", "top-k", *SMALL, "--passes", "forward", "--output", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    rows = {(row["name"], row["variant"]): row for row in read_rows([tmp_path / "rows.csv"])}
    assert set(rows) == {(n, p) for n in ("window", "top-k") for p in ("auto", "torch")}
    assert rows["top-k", "torch"]["select_ms"] > 0 and rows["window", "torch"]["select_ms"] is None


def test_lengths_come_from_a_memory_probe(monkeypatch):
    shape = Shape(heads=4, kv_heads=2, head_dim=16)
    per_token = 20 * 4 * 16 * 4 + 4 * 64 * 4 * 8
    monkeypatch.setattr(levels, "free_memory", lambda device: 2 * per_token * 3000)
    assert levels.fitting_lengths("cpu", shape, ["fp32"]) == [512, 1024, 2048]


def test_keys_hold_hardware_versions_and_shapes(tmp_path):
    assert {"hardware", "torch", "triton", "git", "shape", "threads"} <= set(KEY) <= set(COLUMNS)
    store = Store(tmp_path / "rows.csv")
    store.add({"name": "a", "status": "ok"})
    assert Store(tmp_path / "rows.csv").has({"name": "a"}) and not store.has({"name": "a", "git": "other"})
    with pytest.raises(ValueError, match="no columns"):
        store.add({"speed": 1})


def test_committed_results_can_be_read():
    rows = read_rows(committed_results())
    assert rows and all(row["hardware"] and row["torch"] and row["git"] for row in rows)


BAD = {
    "op": (["op", "sparse"], "no op is called 'sparse'; there are block_sparse_attention"),
    "mask": (["mask", "diagonal"], "no pattern is called 'diagonal'; there are causal"),
    "dtype": (["op", "--dtype", "int8"], "--dtype must be of fp32, bf16, fp16, got 'int8'"),
    "density": (["op", "--density", "0"], "--density must be numbers in (0, 1], got '0'"),
    "passes": (["op", "--passes", "sideways"], "--passes must be of forward, backward, decode"),
    "path": (["op", "--path", "fast"], "unknown paths ['fast']"),
    "device": (["op", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    "lengths": (["op", "--lengths", "1k"], "--lengths must be comma-separated integers"),
    "heads": (["op", "--heads", "3"], "--heads must be a multiple of --kv-heads, got 3 and 4"),
    "output": (["op", "--output", "rows.txt"], "the output must end in .csv or .jsonl, got rows.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "\x00\x01", "{", "[1]\n"])
def test_an_unreadable_file_is_one_clear_line(text, tmp_path):
    for name in ("rows.csv", "rows.jsonl"):
        (tmp_path / name).write_text(text)
        result = run("op", *SMALL, "--output", tmp_path / name)
        assert result.exit_code == 2 and "is not a file of results" in result.output, result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("level", ["op", "mask"])
def test_help_has_an_example(level):
    result = run(level, "--help")
    assert result.exit_code == 0 and f"hf-attn bench {level} " in result.output
