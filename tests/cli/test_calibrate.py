"""`hf-attn calibrate`: a folder for the Hub from one line, and clear lines for what cannot be done."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_attn
from hf_attn.analysis.head_files import load_heads
from hf_attn.cli.app import app
from hf_attn.integrations.hub.cards import check_card

SMALL = ["--sink", "8", "--local", "32", "--length", "128", "--tokens", "512"]
WIDE = {"COLUMNS": "400"}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=WIDE)


@pytest.mark.parametrize("command", [["calibrate"], ["calibrate", "lserve"]])
def test_help_has_an_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0 and "hf-attn calibrate lserve HuggingFaceTB/" in result.output


def test_folder_with_everything(tiny_model, tmp_path):
    """Measured, evaluated, with weights and scales, and in DuoAttention's format; loads by itself."""
    out, duo = tmp_path / "out", tmp_path / "duo"
    arguments = [*SMALL, "--sparsity", 0.25, "--kv-scales", "--evaluate", "--with-weights", "--duo", duo]
    result = run("calibrate", "lserve", tiny_model, "--output", out, *arguments, "-o", "token_budget=256")
    assert result.exit_code == 0, result.output
    assert "calibrate 100%" in result.output and "1 of 4 KV heads stream" in result.output
    options = json.loads((out / "config.json").read_text())["hf_attn"]
    assert options["mechanism"] == "lserve" and options["static_sparsity"] == 0.25 and options["token_budget"] == 256
    assert len(options["kv_scales"]) == 2 and "dec_local" not in options  # 32 tokens are no whole page
    found = load_heads(out)
    assert found.method == "mass" and found.tokens == 512
    assert torch.equal(hf_attn.load_duo_heads(duo).alpha, found.gates)
    check_card(out / "README.md")
    card = (out / "README.md").read_text()
    assert "| ratio |" in card and "model.safetensors" in card and tiny_model not in card
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config._attn_implementation == "hf_attn_lserve"
    assert hf_attn.stats(model)["options"]["static_sparsity"] == 0.25


def test_gates_of_duo_attention(tiny_model, tmp_path):
    """Nothing is measured, and the gates come out as they went in; windows of whole pages go into the config."""
    duo = tmp_path / "duo"
    duo.mkdir()
    (duo / "full_attention_heads.tsv").write_text("0.25\t1\n0.5\t0.125\n")
    (duo / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')
    arguments = ["--gates", duo, "--base-model", "me/tiny", "--license", "mit"]
    result = run("calibrate", "lserve", tiny_model, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    options = json.loads((tmp_path / "out" / "config.json").read_text())["hf_attn"]
    assert options["gates"] == [[0.25, 1.0], [0.5, 0.125]]
    assert (options["dec_sink"], options["dec_local"]) == (64, 256)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: me/tiny" in card and "license: mit" in card and "| method | duo |" in card
    assert "| smallest gate of a retrieval head | 0.5 |" in card
    again = run("calibrate", "lserve", tiny_model, "--output", tmp_path / "again", "--gates", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert torch.equal(load_heads(tmp_path / "again").gates, load_heads(tmp_path / "out").gates)


BAD = {
    "existing folder": ([], {"output": ""}, "exists already and is never overwritten"),
    "existing duo folder": (["--duo", "{here}"], {}, "exists already and is never overwritten"),
    "sizes": (["--local", "4000"], {}, "have no key outside sink=64 and local=4000"),
    "option": (["-o", "page_siz=64"], {}, "did you mean 'page_size'?"),
    "text": (["--text", "/no/such/file"], {}, "/no/such/file"),
    "gates": (["--gates", "/no/such"], {}, "no such file"),
    "gates and scales": (["--gates", "{here}", "--kv-scales"], {}, "--kv-scales needs a measurement"),
    "model": (["/no/such/model"], {"model": None}, "/no/such/model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, tiny_model, tmp_path):
    (tmp_path / "mine").write_text("x")
    arguments, places, message = BAD[name]
    arguments = [a.format(here=tmp_path) for a in arguments]
    model = [] if "model" in places else [tiny_model]
    result = run("calibrate", "lserve", *model, "--output", tmp_path / places.get("output", "out"), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_interruption_leaves_no_folder(tiny_model, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_attn.cli.calibrate.save_duo_heads", interrupted)
    monkeypatch.setattr("hf_attn.analysis.head_files.save_heads", interrupted)
    result = run("calibrate", "lserve", tiny_model, "--output", tmp_path / "out", *SMALL)
    assert result.exit_code != 0 and list(tmp_path.iterdir()) == []
