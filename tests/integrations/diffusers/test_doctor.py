"""What doctor says of a pipeline: is it called, and what can it gain?"""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel, WanTransformer3DModel
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli.app import app
from hf_attn.integrations.diffusers.potential import Size, count_work
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import PIPELINES, build

pytestmark = pytest.mark.filterwarnings("ignore")


def published(cls, **config):
    with torch.device("meta"):
        return cls(**config)


def test_flux_at_1024_gains_at_most_a_quarter():
    # FLUX.1 with fewer layers of each kind, in the published proportion of 1 to 2: the share does not depend on depth.
    model = published(FluxTransformer2DModel, num_layers=1, num_single_layers=2, guidance_embeds=True)
    work = count_work(model, Size(1024, 1024))
    assert work.tokens == 4608
    assert work.share == pytest.approx(0.20, abs=0.002)
    assert work.bound(0.2) == pytest.approx(1.19, abs=0.01)
    assert work.bound(0.0) == pytest.approx(1.25, abs=0.01)
    assert work.bound(0.2, dense_share=0.25) < work.bound(0.2)


def test_video_shares():
    wan = published(WanTransformer3DModel, num_attention_heads=12, ffn_dim=8960, num_layers=2)
    assert count_work(wan, Size(480, 832, 81)).tokens == 32760
    assert count_work(wan, Size(480, 832, 81)).share == pytest.approx(0.699, abs=0.002)
    cog = published(
        CogVideoXTransformer3DModel, num_attention_heads=48, num_layers=2, use_rotary_positional_embeddings=True
    )
    assert count_work(cog, Size(480, 720, 49)).tokens == 17776
    assert count_work(cog, Size(480, 720, 49)).share == pytest.approx(0.491, abs=0.003)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "hunyuan15"])
def test_every_class_can_be_counted_and_probed(name):
    tiny = build(name, layers=1)
    hf_attn.apply(tiny.model, "band", density=0.3, **SMALL)
    before = hf_attn.stats(tiny.model)
    weights = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    frames = 17 if "3D" in type(tiny.model).__name__ else 1
    size = (128, 192) if name in ("ltx", "ltx2", "sdxl") else (64, 96) if name != "dit" else (128, 128)
    state = torch.random.get_rng_state()
    report = hf_attn.doctor(tiny.model, height=size[0], width=size[1], num_frames=frames, probe=True)
    assert report.ok, report
    assert torch.equal(torch.random.get_rng_state(), state)
    text = str(report)
    assert "of the denoiser's work; at most" in text
    assert f"in the probe: {len(before['layers'])} attention calls" in text
    assert f"{len(before['layers'])} sparse" in text.split("in the probe")[1]
    assert "grid: " in text
    assert hf_attn.stats(tiny.model) == before
    assert all(torch.equal(value, weights[key]) for key, value in tiny.model.state_dict().items())


def test_a_pipeline_without_mechanism_and_one_that_lost_it():
    tiny = build("cogvideox")
    report = hf_attn.doctor(tiny.target, height=32, width=48, num_frames=9)
    assert not report.ok and "no mechanism is set" in str(report)
    hf_attn.apply(tiny.target, "band", density=0.3)
    tiny.run()
    report = hf_attn.doctor(tiny.target, height=32, width=48, num_frames=9)
    assert report.ok
    assert "so far: 4 attention calls of transformer, 0 sparse" in str(report)
    assert "4 calls dense: fewer than min_tokens=4096 tokens" in str(report)
    assert "note: fewer than min_tokens=4096 tokens, so every call stays dense" in str(report)
    assert "with these options (density 0.3, with 25% of the steps dense): at most" in str(report)
    tiny.model.fuse_qkv_projections()
    report = hf_attn.doctor(tiny.target)
    assert "2 of 2 attention processors of transformer were replaced by FusedCogVideoX" in report.problems[0]


def test_bad_sizes():
    tiny = build("flux")
    with pytest.raises(ValueError, match="width must be an integer >= 1 .pixels, frames., got None"):
        hf_attn.doctor(tiny.target, height=64)
    with pytest.raises(ValueError, match="height must be an integer >= 1 .pixels, frames., got None"):
        hf_attn.doctor(tiny.target, probe=True)


def test_the_command_reads_configurations_only(tmp_path):
    tiny = build("wan")
    tiny.target.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    run = CliRunner().invoke(app, ["doctor", str(tmp_path), "--size", "32x48x9"])
    assert run.exit_code == 0, run.output
    assert "transformer at 32x48x9: 18 tokens, attention is" in " ".join(run.output.split())
    run = CliRunner().invoke(app, ["doctor", str(tmp_path), "--size", "32"])
    assert run.exit_code == 2 and "--size is HEIGHTxWIDTH" in run.output
    run = CliRunner().invoke(app, ["doctor", "--size", "32x48"])
    assert run.exit_code == 2 and "--size needs a diffusers pipeline" in run.output
