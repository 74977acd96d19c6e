"""The OneFormer recipe: `--smoke` ends, a run that was interrupted goes on, its result segments a photograph."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_attn.training.scenes import Scene, class_map, mean_iou, scenes, task_targets, task_texts, word_encoder
from tests.recipes.test_moba_recipes import script, smoke

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smoke_resume_and_example(tmp_path, monkeypatch, capsys):
    smoke("oneformer_finetune", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] < results["loss at start"] and 0 <= results["mean IoU"] <= 1
    assert "| mean IoU |" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8", ignore_errors=True)
    smoke("oneformer_finetune", tmp_path, monkeypatch)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["mean IoU"] == pytest.approx(results["mean IoU"], abs=1e-3)
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "oneformer_segment.py"), "--model", str(tmp_path / "model"),
               "--output", str(tmp_path / "out.png"), "--size", "64"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out.png: 640 x 427" in done.stdout and Image.open(tmp_path / "out.png").size == (640, 427)


def test_a_folder_of_pictures(tmp_path):
    read_folder = script("oneformer_finetune").read_folder
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no labelled pictures"):
        read_folder(tmp_path, 32)
    pixels = np.full((40, 30, 3), 128, dtype=np.uint8)
    labels = np.zeros((40, 30, 3), dtype=np.uint8)
    labels[:20, :, 0], labels[:20, :15, 1], labels[30:, :, 0] = 2, 1, 255
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    (picture,) = read_folder(tmp_path, 32)
    assert picture.image.shape == (3, 32, 32) and picture.classes.tolist() == [0, 2, 2]
    assert picture.masks.sum(0).max() == 1 and picture.labels[-1, 0] == -1 and picture.labels[0, 0] == 2


def test_scenes_are_the_same_every_time_and_cover_the_picture():
    for a, b in zip(scenes(6, size=32, seed=3), scenes(6, size=32, seed=3), strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.masks, b.masks)
        assert (a.masks.sum(0) == 1).all() and len(a.classes) >= 2 and (a.labels >= 0).all()
    assert not torch.equal(scenes(1, seed=0)[0].image, scenes(1, seed=1)[0].image)


def test_targets_of_the_three_tasks():
    masks = torch.eye(4, dtype=torch.bool).view(4, 2, 2)
    scene = Scene(torch.zeros(3, 2, 2), masks, torch.tensor([0, 1, 1, 2]))
    counts = {task: task_targets(scene, task)[1].tolist() for task in ("semantic", "instance", "panoptic")}
    assert counts == {"semantic": [0, 1, 2], "instance": [1, 1, 2], "panoptic": [0, 1, 1, 2]}
    both = task_targets(scene, "semantic")[0][1]
    assert torch.equal(both, (masks[1] | masks[2]).float())
    texts = task_texts(torch.tensor([1]), "instance", ("noise", "rectangle"), 3)
    assert texts == ["a photo with a rectangle", "an instance photo", "an instance photo"]
    with pytest.raises(ValueError, match="task must be one of"):
        task_targets(scene, "depth")


def test_the_last_id_of_a_sentence_is_the_largest():
    encode, size = word_encoder(("noise", "red disc"), 8)
    ids = encode("a photo with a red disc")
    assert len(ids) == 8 and max(ids) == size - 1 and ids[6] == size - 1 and ids[7] == 0
    assert encode("a photo with a red disc a photo")[-1] == size - 1


def test_class_map_and_mean_iou():
    logits = torch.full((1, 2, 3), -20.0)
    logits[0, 0, 0], logits[0, 1, 1] = 20, 20
    masks = torch.tensor([[[[9.0, -9], [9, -9]], [[-9.0, 9], [-9, 9]]]])
    found = class_map(logits, masks, (2, 2))
    assert found.tolist() == [[[0, 1], [0, 1]]]
    wanted = torch.tensor([[[0, 1], [1, -1]]])
    assert mean_iou(found, wanted, 3) == pytest.approx((1 / 2 + 1 / 2) / 2)
