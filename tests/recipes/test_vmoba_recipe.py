"""Moving shapes, the tiny Wan that learns them, the recipe of VMoBA, and the comparison of videos."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel

import hf_attn
from hf_attn.bench import video_quality
from hf_attn.training import moving_shapes as shapes
from tests.recipes.test_moba_recipes import RECIPES, smoke

SMALL = {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
SIZE = {"frames": 4, "height": 8, "width": 8}
pytestmark = pytest.mark.filterwarnings("ignore:hf_attn")


def test_shapes_move_and_are_the_same_everywhere():
    videos, captions = shapes.moving_shapes(40, seed=3)
    again, _ = shapes.moving_shapes(40, seed=3)
    other, _ = shapes.moving_shapes(40, seed=4)
    assert videos.shape == (40, 3, 8, 16, 16) and captions.shape == (40, 2)
    assert torch.equal(videos, again) and not torch.equal(videos, other)
    assert -1 <= float(videos.min()) < -0.5 and 0.8 < float(videos.max()) <= 1
    bright = (videos.amax(1) > 0).float()  # [40, F, H, W]
    assert bool((bright.flatten(1).mean(1) > 0.01).all()) and float(bright.mean()) < 0.5
    moved = (bright[:, 1:] - bright[:, :-1]).abs().flatten(1).sum(1)
    assert float((moved > 0).float().mean()) > 0.9
    reds = videos[captions[:, 1] == 0]
    assert bool((reds[:, 0] >= reds[:, 1] - 0.3).all())  # red shapes on a grey background
    assert shapes.caption_embeds(captions, 6).shape == (40, 2, 6)
    with pytest.raises(ValueError, match="frames must be an integer >= 1, got 0"):
        shapes.moving_shapes(1, frames=0)


def test_an_interrupted_training_goes_on_with_the_same_numbers(tmp_path):
    options = {"steps": 6, "batch_size": 2, "warmup": 1, "size": SIZE, "save_every": 2}
    whole = shapes.tiny_wan(0, **SMALL)
    want = shapes.train(whole, folder=tmp_path / "whole", **options)
    assert len(want) == 6 and want[-1] < want[0]

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        shapes.train(shapes.tiny_wan(0, **SMALL), folder=tmp_path / "cut", report=stop, **options)
    resumed = shapes.tiny_wan(0, **SMALL)
    assert shapes.train(resumed, folder=tmp_path / "cut", **options) == pytest.approx(want, rel=1e-5)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_trained_model_is_kept(tmp_path, monkeypatch):
    build = shapes.tiny_wan
    monkeypatch.setattr(shapes, "tiny_wan", lambda seed: build(seed, **SMALL))
    options = {"steps": 2, "batch_size": 2, "size": SIZE}
    model = shapes.trained_wan(tmp_path, **options)
    monkeypatch.setattr(shapes, "train", None)
    again = shapes.trained_wan(tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="use another folder"):
        shapes.trained_wan(tmp_path, **{**options, "steps": 3})


def test_videos_are_compared_with_dense_ones():
    pipe = shapes.shapes_pipeline(shapes.tiny_wan(0, **SMALL))
    common = {"min_tokens": 0, "dense_steps": 0.5, "strict": True}
    run = {"seeds": [0, 1], "steps": 2}
    found, density = video_quality.compare(pipe, "vmoba", {"density": 0.25, **common}, **run)
    assert density == pytest.approx(0.25, abs=0.01)
    nearly, _ = video_quality.compare(pipe, "vmoba", {"density": 1.0, **common}, **run)
    assert max(found) + 10 < min(nearly) and min(nearly) > 80
    assert hf_attn.stats(pipe)["mechanism"] is None
    with pytest.raises(RuntimeError, match="computed nothing sparse: .*fewer than min_tokens"):
        video_quality.compare(pipe, "vmoba", {"density": 0.25}, **run)
    assert shapes.psnr(torch.zeros(2), torch.zeros(2)) == float("inf")
    assert shapes.psnr(torch.zeros(2), torch.full((2,), 0.2)) == pytest.approx(20.0)


def test_options_of_the_command_line():
    assert video_quality.parse_options(["psa.block_size=32", "vmoba.scope=head_global", "vmoba.st_block=[2,2,2]"]) == {
        "psa": {"block_size": 32},
        "vmoba": {"scope": "head_global", "st_block": [2, 2, 2]},
    }
    with pytest.raises(ValueError, match="--option must look like psa.block_size=32, got 'block_size'"):
        video_quality.parse_options(["block_size"])


@pytest.mark.parametrize("config", ["config.yaml", pytest.param("tune.yaml", marks=pytest.mark.slow)])
def test_the_recipe(config, tmp_path, monkeypatch, capsys):
    path = str(RECIPES / "vmoba_finetune" / config)
    smoke("vmoba_finetune", tmp_path, monkeypatch, "--config", path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["dense", "vmoba", "moba 1d"]
    for name, (row,) in results.items():
        assert row["loss"] < row["start_loss"], name
        assert (row["density"] is None) == (name == "dense")
    assert results["vmoba"][0]["density"] < results["moba 1d"][0]["density"] == pytest.approx(0.5)
    assert "| moba 1d |" in capsys.readouterr().out and (tmp_path / "results.md").is_file()
    WanTransformer3DModel.from_pretrained(tmp_path / "vmoba-0" / "model")

    # The last variant is interrupted after its first checkpoint; the others are done and are not repeated.
    want = json.loads((tmp_path / "moba 1d-0" / "result.json").read_text())
    (tmp_path / "moba 1d-0" / "result.json").unlink()
    shutil.rmtree(tmp_path / "moba 1d-0" / "model")
    smoke("vmoba_finetune", tmp_path, monkeypatch, "--config", path)
    again = json.loads((tmp_path / "moba 1d-0" / "result.json").read_text())
    assert again["loss"] == pytest.approx(want["loss"], rel=1e-4)
