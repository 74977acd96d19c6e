"""`hf-attn bench model`: weights are shared, wrong results have no speed."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import hf_attn
from hf_attn.bench.model_level import twin
from hf_attn.bench.record import read_rows
from hf_attn.cli.app import app

MOBA = [
    "--mechanism",
    "moba",
    "-o",
    "block_size=32",
    "-o",
    "top_k=2",
    "-o",
    "min_seq_len=0",
    "--dtype",
    "fp32",
    "--lengths",
    "256",
]


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", "model", *map(str, arguments)], env={"COLUMNS": "250"})


def test_passes_of_a_language_model(tiny_model, tmp_path):
    file = tmp_path / "rows.csv"
    arguments = [tiny_model, *MOBA, "--passes", "prefill", "decode", "train", "--output", file]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    rows = {row["pass"]: row for row in read_rows([file])}
    assert set(rows) == {"prefill", "decode", "train"} and "3 new rows" in result.output
    for row in rows.values():
        assert row["ms"] > 0 and row["speedup"] > 0 and row["dense_ms"] > 0 and row["error"] <= row["allowed"]
        assert row["variant"] == "moba" and row["options"] == "block_size=32 top_k=2 min_seq_len=0"
    assert 0 < rows["prefill"]["density"] < 1
    assert "0 new rows" in run(*arguments).output


def test_a_wrong_mechanism_has_no_speed(tiny_model, tmp_path, monkeypatch):
    from hf_attn.ops.hfattn_sparse.routed import torch_path

    original = torch_path.forward
    monkeypatch.setattr(torch_path, "forward", lambda *a, **k: tuple(1.1 * x for x in original(*a, **k)))
    result = run(tiny_model, *MOBA, "--passes", "prefill", "--output", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    (row,) = read_rows([tmp_path / "rows.csv"])
    assert row["status"] == "check failed: no speed" and row["ms"] is None and row["speedup"] is None


def test_a_twin_shares_weights_and_nothing_else(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    other = hf_attn.apply(twin(model), "moba", block_size=32, top_k=2)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model.config._attn_implementation != other.config._attn_implementation


@pytest.mark.slow
def test_a_video_transformer(tmp_path):
    pytest.importorskip("diffusers")
    arguments = ["--mechanism", "vmoba", "-o", "density=0.5", "-o", "min_tokens=0", "-o", "dense_steps=0"]
    result = run("small", *arguments, "--lengths", 512, "--output", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    (row,) = read_rows([tmp_path / "rows.csv"])
    assert row["pass"] == "call" and row["speedup"] > 0 and row["density"] < 1


BAD = {
    "mechanism": (["--mechanism", "mobo"], "mobo"),
    "passes": (["--passes", "sideways"], "--passes must be of prefill, decode, train"),
    "length": (["--lengths", "4096"], "this model ends at 2048"),
    "video": (["small", "--mechanism", "vmoba", "--lengths", "300"], "--lengths of a video must be of 512, 1024"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, tiny_model, tmp_path):
    arguments, message = BAD[name]
    given = [] if name == "video" else [tiny_model]
    result = run(*given, *arguments, "--dtype", "fp32", "--output", tmp_path / "rows.csv")
    assert result.exit_code == 2 and message in result.output, result.output
