"""The example that puts a backbone under a segmentation head runs from start to pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.vision_families import classifier

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_example(tmp_path):
    classifier("emov2").save_pretrained(tmp_path / "classifier")
    command = [sys.executable, str(ROOT / "examples/segmentation_backbone.py"), "--steps", "3"]
    command += ["--checkpoint", str(tmp_path / "classifier"), "--output", str(tmp_path / "segmenter")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of those on strokes" in done.stdout and "a picture of a" in done.stdout
    assert (tmp_path / "segmenter" / "model.safetensors").is_file()
