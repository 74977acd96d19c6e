"""The UoE recipe: `--smoke` ends, its loss falls, and a run that was interrupted goes on."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.recipes.test_moba_recipes import smoke


def test_uoe(tmp_path, monkeypatch, capsys):
    smoke("uoe", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results)[-2:] == ["uoe, trained", "dense, trained the same way"]
    assert results["uoe, trained"] < results["uoe, fitted gates"] - 0.1
    assert "| uoe, trained |" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "uoe" / "checkpoint-8")
    smoke("uoe", tmp_path, monkeypatch)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["uoe, trained"] == pytest.approx(results["uoe, trained"], rel=1e-3)
