"""hf_attn.compare and presets by model id, on tiny pipelines."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

import hf_attn
from tests.integrations.diffusers.tiny import build

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"block_size": 8, "min_tokens": 0, "dense_steps": 0}


def call_of(tiny):
    return {**tiny.call, "num_inference_steps": tiny.steps}


@pytest.mark.parametrize("name, frames", [("wan", 9), ("flux", 1)])
def test_frames_are_compared_and_drawn(name, frames, tmp_path):
    tiny = build(name)
    stock = tiny.run()
    path = tmp_path / "new" / "picture.png"
    found = hf_attn.compare(tiny.target, "psa", call_of(tiny), path=path, density=0.5, **OPTIONS)
    assert len(found.psnr) == frames and all(math.isfinite(p) and p > 10 for p in found.psnr)
    assert (found.sparse_calls, found.calls) == (tiny.calls, tiny.calls) and 0 < found.density < 1
    # The frames themselves, by hand.
    images = []
    for density in (None, 0.5):
        if density:
            hf_attn.apply(tiny.target, "psa", density=density, **OPTIONS)
        out = tiny.target(**call_of(tiny), generator=torch.Generator().manual_seed(0), output_type="np")
        images.append(out.frames[0] if frames > 1 else out.images)
    hf_attn.remove(tiny.target)
    errors = ((images[0].astype(float) - images[1]) ** 2).reshape(frames, -1).mean(1)
    np.testing.assert_allclose(found.psnr, -10 * np.log10(errors), rtol=1e-6)
    assert found.mean_psnr == pytest.approx(-10 * math.log10(errors.mean()))
    with Image.open(path) as picture:
        height, width = images[0].shape[1:3]
        assert picture.size == (width * min(frames, 8), 3 * (height + 14))
        drawn = np.asarray(picture.convert("RGB"))[14 : 14 + height, :width]
    assert np.abs(drawn / 255 - images[0][0]).max() <= 0.5 / 255 + 1e-6
    assert f"PSNR {found.mean_psnr:.2f} dB over {frames} frames" in str(found) and str(path) in str(found)
    # Nothing is left behind.
    assert torch.equal(tiny.run(), stock)


def test_dense_steps_alone_change_nothing():
    tiny = build("wan")
    found = hf_attn.compare(tiny.target, "psa", call_of(tiny), **{**OPTIONS, "dense_steps": tiny.steps})
    assert set(found.psnr) == {math.inf} and found.mean_psnr == math.inf and found.density is None
    assert "0 of" in str(found) and found.path is None


def test_bad_comparisons():
    tiny = build("wan")
    with pytest.raises(TypeError, match="takes a diffusers pipeline, got WanTransformer3DModel"):
        hf_attn.compare(tiny.model, "psa", {})
    with pytest.raises(ValueError, match="call must not hold generator, output_type"):
        hf_attn.compare(tiny.target, "psa", {"output_type": "pil", "generator": None})
    with pytest.raises(ValueError, match="no option 'densty'"):
        hf_attn.compare(tiny.target, "psa", {}, densty=0.5)
    hf_attn.apply(tiny.target, "psa")
    with pytest.raises(ValueError, match="has a mechanism already"):
        hf_attn.compare(tiny.target, "psa", {})


def test_a_failing_generation_leaves_the_pipeline_as_it_was():
    tiny = build("wan")
    stock = tiny.run()
    step, runs = tiny.target.scheduler.step, []

    def fail_later(*args, **kwargs):
        runs.append(1)
        if len(runs) > tiny.steps:
            raise RuntimeError("out of memory")
        return step(*args, **kwargs)

    tiny.target.scheduler.step = fail_later
    with pytest.raises(RuntimeError, match="out of memory"):
        hf_attn.compare(tiny.target, "psa", call_of(tiny), **OPTIONS)
    tiny.target.scheduler.step = step
    assert hf_attn.stats(tiny.target)["mechanism"] is None and torch.equal(tiny.run(), stock)


@pytest.mark.parametrize(
    "source, preset",
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1-1.3b"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan2.1-14b"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan2.2-a14b"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan2.2-5b"),
        ("THUDM/CogVideoX1.5-5B", "cogvideox1.5-5b"),
        ("/models/CogVideoX-5b", "cogvideox-5b"),
        ("THUDM/CogVideoX-5b-I2V", None),
        ("black-forest-labs/FLUX.1-dev", None),
    ],
)
def test_known_models_have_a_preset(source, preset, caplog):
    tiny = build("wan")
    tiny.target.register_to_config(_name_or_path=source)
    with caplog.at_level(logging.WARNING, logger="hf_attn"):
        hf_attn.apply(tiny.target, "psa")
    assert [f"preset='auto' takes them ({preset!r})" in r.getMessage() for r in caplog.records] == [True] * bool(preset)
    default = hf_attn.stats(tiny.target)["options"]
    hf_attn.remove(tiny.target)
    caplog.clear()
    if preset is None:
        with pytest.raises(ValueError, match=f"'psa' has no preset for {source}"):
            hf_attn.apply(tiny.target, "psa", preset="auto")
        return
    hf_attn.apply(tiny.target, "psa", preset="auto", dense_steps=3)
    chosen = hf_attn.stats(tiny.target)["options"]
    hf_attn.remove(tiny.target)
    hf_attn.apply(tiny.target, "psa", preset=preset, dense_steps=3)
    assert chosen == hf_attn.stats(tiny.target)["options"] != default and not caplog.records


def test_models_built_in_memory_have_no_preset():
    with pytest.raises(ValueError, match="no preset for a model that was built in memory; name one"):
        hf_attn.apply(build("wan").target, "psa", preset="auto")
