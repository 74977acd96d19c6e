"""The recipe and the example of BlockRank: a run of seconds, and one that goes on where it stopped."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "recipes" / "blockrank" / "train.py"


def test_smoke_and_resume(tmp_path, monkeypatch, capsys):
    """A second start trains no further and measures nothing again; a lost measurement alone is made again."""
    module = runpy.run_path(str(TRAIN), run_name="blockrank")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["train.py", "--smoke", "--output", str(tmp_path)])
    module["main"]()
    first = capsys.readouterr().out
    assert '"documents_in_both": 0' in first and "| 3 | tuned |" in first and "| 3 | BM25 |" in first
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    kept = {name: values for name, values in ranks.items() if name != "tuned 3"}
    (tmp_path / "ranks.json").write_text(json.dumps(kept))
    shutil.rmtree(tmp_path / "ranker")
    module["main"]()
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "ranks.json").read_text()) == ranks
    assert (tmp_path / "ranker" / "adapter_config.json").is_file() and "'loss':" not in capsys.readouterr().out


def test_every_option_is_explained():
    """Each line of the YAML that sets something stands under a comment of its block."""
    blocks = (TRAIN.parent / "config.yaml").read_text().strip().split("\n\n")
    assert all("#" in block for block in blocks)
    assert {"ranker", "loss", "lora", "training", "evaluation"} <= set(yaml.safe_load("\n\n".join(blocks)))


@pytest.mark.slow
def test_example(tiny_model):
    command = [sys.executable, "examples/blockrank.py", "--model", tiny_model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[0].startswith("1. 0.") and lines[-1].startswith("2 of 2 layers")
