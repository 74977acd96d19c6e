"""The recipe tnl_pretrain: `--smoke` ends, both models learn, the best rate is taken, an interrupted run goes on."""

from __future__ import annotations

import json

import pytest

from tests.recipes.test_moba_recipes import smoke

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


def test_smoke(tmp_path, monkeypatch, capsys):
    smoke("tnl_pretrain", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["tnl", "llama"]
    for name, found in results.items():
        assert found["tried"][f"{found['rate']:g}"] == min(found["tried"].values())
        assert len(found["seeds"]) == 2 and len(found["seeds"][0]["by_position"]) == 2
        for seed in found["seeds"]:
            assert seed["curve"][0][1] > seed["loss"] and seed["loss"] < 4.2, name
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "| llama |" in capsys.readouterr().out

    # A run that was stopped behind its last checkpoint gives the same.
    (folder,) = tmp_path.glob(f"tnl-{results['tnl']['rate']:g}-1")
    (folder / "result.json").unlink()
    smoke("tnl_pretrain", tmp_path, monkeypatch)
    again = json.loads((folder / "result.json").read_text())
    assert again["loss"] == pytest.approx(results["tnl"]["seeds"][1]["loss"], rel=1e-4)
