"""The image recipe and its pieces: `--smoke` ends and learns, an interrupted run goes on, images are treated right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from hf_attn.training import images as pieces
from hf_attn.training.image_trainer import WeightAverage
from tests.models.vision_families import classifier
from tests.recipes.test_moba_recipes import RECIPES, smoke

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
CONFIG = Path(RECIPES) / "image_classification" / "config.yaml"


def test_smoke(tmp_path, monkeypatch, capsys):
    smoke("image_classification", tmp_path, monkeypatch, "--backbones", "biformer")
    row = json.loads((tmp_path / "results.json").read_text())["biformer"]["random"][0]
    assert row["start_loss"] == pytest.approx(2.3, abs=0.1) and row["loss"] < 1.2 and row["accuracy"] > 0.8
    assert row["nearest_neighbour"] == pytest.approx(0.989, abs=0.001)
    assert "| biformer |" in capsys.readouterr().out

    # Interrupted after the last checkpoint: the rest of the steps gives the same model.
    folder = tmp_path / "biformer-random-0"
    assert list(folder.glob("checkpoint-*/average.safetensors"))
    (folder / "result.json").unlink()
    smoke("image_classification", tmp_path, monkeypatch, "--backbones", "biformer")
    again = json.loads((folder / "result.json").read_text())
    assert again["loss"] == pytest.approx(row["loss"], rel=1e-3) and again["accuracy"] == row["accuracy"]


def test_every_option_is_commented():
    text = CONFIG.read_text()
    for option, value in yaml.safe_load(text).items():
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{option}:"))
        assert "#" in lines[at], option
        if option in ("model", "augment", "mixing", "training"):
            for name in value:
                assert "#" in next(line for line in lines[at:] if line.startswith(f"  {name}:")) or name in (
                    "lr_scheduler_type", "logging_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                ), name  # fmt: skip


def test_digits():
    train, tail = pieces.digits("tail")
    assert len(train) == 1437 and len(tail) == 360 and train.pixels.shape[1:] == (1, 8, 8)
    assert pieces.nearest_neighbour(train, tail) == pytest.approx(0.9556, abs=1e-4)
    random = pieces.digits("random", 3)
    assert not torch.equal(random[1].labels, tail.labels) and len(random[1]) == 360
    assert torch.equal(pieces.digits("random", 3)[1].pixels, random[1].pixels)
    with pytest.raises(ValueError, match="split must be"):
        pieces.digits("head")


def test_colored_shapes():
    """Labels come from the questions; pixels must agree with them."""
    pytest.importorskip("easy_vqa", reason="needs the package easy-vqa")
    train, test = pieces.colored_shapes()
    assert len(train) == 3542 and len(test) == 880 and train.pixels.shape[1:] == (3, 64, 64)
    assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(24))
    red = test.pixels[test.labels % 8 == pieces.COLORS.index("red")]
    off = (red - red[:, :, :1, :1]).abs().sum(1) > 0.5
    means = torch.stack([(red[:, c] * off).sum() / off.sum() for c in range(3)])
    assert means[0] > 0.9 and means[1:].max() < 0.3


def test_mixing():
    torch.manual_seed(0)
    pixels = torch.stack([torch.full((1, 8, 8), float(value)) for value in range(4)])
    targets = torch.eye(4)
    for options in ({"mixup": 0.8}, {"cutmix": 1.0}):
        for _ in range(20):
            mixed, soft = pieces.mix(pixels, targets, **options)
            torch.testing.assert_close(soft.sum(1), torch.ones(4))
            # What is seen of an image is what its class is worth.
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(4.0))
    assert pieces.mix(pixels, targets)[0] is pixels


def test_random_affine():
    torch.manual_seed(0)
    pixels = torch.rand(3, 2, 9, 9)
    assert pieces.random_affine(pixels) is pixels
    torch.testing.assert_close(pieces.random_affine(pixels, shift=1e-9), pixels, rtol=1e-4, atol=1e-4)
    moved = pieces.random_affine(pixels, degrees=30, shift=0.2, zoom=0.2)
    assert moved.shape == pixels.shape and not torch.allclose(moved[0], moved[1] - pixels[1] + pixels[0])


def test_soft_loss_knows_auxiliary_heads():
    logits, targets = torch.randn(3, 4), torch.eye(4)[:3]
    plain = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    assert pieces.soft_loss({"logits": logits}, targets).item() == pytest.approx(plain.item())
    both = pieces.soft_loss({"logits": logits, "aux_logits": logits}, targets, aux_weight=0.5)
    assert both.item() == pytest.approx(1.5 * plain.item(), rel=1e-6)


def test_folder_of_images(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.effect_noise((50, 40), 60).save(tmp_path / name / "1.png")
    processor = classifier("patnet").config.image_processor(size={"shortest_edge": 32})
    for crop in (None, 0.2):
        found = pieces.ImageFolder(tmp_path, processor, crop=crop)
        assert found.classes == ["a", "b"] and len(found) == 2
        assert found[1]["pixel_values"].shape == (3, 32, 32) and found[1]["labels"] == 1
    (tmp_path / "empty" / "c").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images"):
        pieces.ImageFolder(tmp_path / "empty", processor)


def test_weight_average(tmp_path):
    class State:
        global_step, is_world_process_zero = 0, True

    class Args:
        output_dir = str(tmp_path)

    model, average, state = torch.nn.BatchNorm1d(2), WeightAverage(0.5), State()
    average.on_train_begin(Args, state, None, model=model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    state.global_step = 100
    average.on_step_end(Args, state, None, model=model)
    assert average.average["weight"].tolist() == [2.0, 2.0] and int(average.average["num_batches_tracked"]) == 7
    (tmp_path / "checkpoint-100").mkdir()
    average.on_save(Args, state, None)
    resumed = WeightAverage(0.5)
    resumed.on_train_begin(Args, state, None, model=model)
    assert resumed.average["weight"].tolist() == [2.0, 2.0]
    resumed.load_into(model)
    assert model.weight.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(1.0)
