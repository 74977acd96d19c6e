"""The example script on tiny pipelines."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.integrations.diffusers.tiny import build

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "faster_video.py"


# The tiny HunyuanVideo has no text encoder that could be saved.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, size, mechanism",
    [("wan", "32x48x9", "vmoba"), ("cogvideox", "32x48x9", "band"), ("flux", "16x24", "band")],
)
def test_the_example_runs(name, size, mechanism, tmp_path, monkeypatch, capsys):
    tiny = build(name)
    tiny.target.save_pretrained(tmp_path / "pipe")
    options = ["--mechanism", mechanism, "--density", "0.5", "--min-tokens", "0", "--steps", "4", "--size", size]
    output = tmp_path / "out.png"
    arguments = [str(SCRIPT), "--model", str(tmp_path / "pipe"), "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    assert output.is_file()
    assert "with these options (density 0.5, with 25% of the steps dense): at most" in printed
    calls = 4 * tiny.branches
    assert f"layer 0: {calls * 3 // 4} sparse calls at density" in printed
    assert f"{calls // 4} dense: dense_steps=0.25" in printed


@pytest.mark.filterwarnings("ignore")
def test_the_plan_example_calibrates_saves_and_loads(tmp_path, monkeypatch, capsys):
    build("wan").target.save_pretrained(tmp_path / "pipe")
    plan = tmp_path / "plan"
    options = ["--size", "32x48x9", "--steps", "4", "--density", "0.5", "--block-size", "4", "--bits", "8"]
    monkeypatch.setattr(sys, "argv", ["paro", "--model", str(tmp_path / "pipe"), "--plan", str(plan), *options])
    for _ in range(2):  # the second time the plan is there
        runpy.run_path(str(SCRIPT.with_name("paro_plan.py")))
        assert (plan / "config.json").is_file()
        assert "layer 1: 6 sparse calls at density" in capsys.readouterr().out
