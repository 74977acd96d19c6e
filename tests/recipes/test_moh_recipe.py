"""The MoH recipe: `--smoke` ends, training lowers the loss, a finished run is not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.recipes.test_moba_recipes import RECIPES, smoke

pytest.importorskip("accelerate")


def test_smoke(tmp_path, monkeypatch, capsys):
    smoke("moh", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())["0"]
    assert list(results) == ["dense", "learned", "query_norm", "random", "dense tuned"]
    for name in ("learned", "query_norm", "random"):
        row = results[name]
        assert row["loss"] < row["before"] - 0.1, name
        assert 0 <= row["load_min"] <= 1 <= row["load_max"], name
        assert (tmp_path / f"{name}-0" / "adapter" / "base_config" / "config.json").is_file()
    assert "| learned |" in capsys.readouterr().out and (tmp_path / "results.md").is_file()
    state = json.loads(next((tmp_path / "learned-0").glob("checkpoint-*/trainer_state.json")).read_text())
    assert any("head_load_max" in entry for entry in state["log_history"])

    made = (tmp_path / "learned-0" / "result.json").stat().st_mtime_ns
    (tmp_path / "query_norm-0" / "result.json").unlink()
    smoke("moh", tmp_path, monkeypatch)
    again = json.loads((tmp_path / "results.json").read_text())["0"]
    assert (tmp_path / "learned-0" / "result.json").stat().st_mtime_ns == made
    assert again["query_norm"]["loss"] == pytest.approx(results["query_norm"]["loss"], rel=1e-4)


def test_every_option_is_commented():
    text = (Path(RECIPES) / "moh" / "config.yaml").read_text()
    for option in yaml.safe_load(text):
        line = next(line for line in text.splitlines() if line.startswith(f"{option}:"))
        assert "#" in line, option
