"""LaMamba-Diff in pipelines of diffusers: guidance, variance, pixel space, saving, loading in a fresh process."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
)

import hf_attn
from hf_attn.models.lamamba_diff.pipeline_lamamba_diff import guided
from tests.loopback_hub import run_python
from tests.models.test_lamamba_diff import tiny


def pixels(scheduler=None, **options):
    model = tiny(in_channels=1, out_channels=1, sample_size=8, **options)
    pipe = hf_attn.LaMambaDiffPipeline(transformer=model, vae=None, scheduler=scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels=(1, 2), steps=2, seed=0, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        list(labels),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **options,
    ).images


def vae():
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()


def test_stock_pipeline(tmp_path):
    """DiTPipeline runs it unchanged, and DiffusionPipeline loads it."""
    pipe = DiTPipeline(transformer=tiny(num_classes=1000), vae=vae(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    before = pipe([1, 7], generator=torch.Generator().manual_seed(0), **options).images
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is hf_attn.LaMambaDiffTransformer2DModel
    loaded.set_progress_bar_config(disable=True)
    assert (loaded([1, 7], generator=torch.Generator().manual_seed(0), **options).images == before).all()
    # Ours draws the same, for its null class is the same and DDIM knows no learned variance.
    ours = hf_attn.LaMambaDiffPipeline(**pipe.components)
    torch.testing.assert_close(sample(ours, (1, 7), guidance_scale=3.0), torch.tensor(before).permute(0, 3, 1, 2))


def test_pixel_space_round_trip(tmp_path):
    pipe = pixels()
    images = sample(pipe)
    assert images.shape == (2, 1, 8, 8) and 0 <= float(images.min()) <= float(images.max()) <= 1
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "hf_attn"
    for loader in (DiffusionPipeline, hf_attn.LaMambaDiffPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is hf_attn.LaMambaDiffPipeline and loaded.vae is None
        assert torch.equal(sample(loaded), images)
    (picture,) = pipe([3], num_inference_steps=1).images
    assert picture.size == (8, 8)


@pytest.mark.parametrize(
    "imports",
    [
        # Asking whether diffusers is there, as many libraries do, must not use up what waits for its import.
        pytest.param(
            "import hf_attn, importlib.util, sys\nassert 'diffusers' not in sys.modules\n"
            "assert importlib.util.find_spec('diffusers')\nfrom diffusers import DiffusionPipeline",
            id="before",
        ),
        pytest.param("from diffusers import DiffusionPipeline\nimport hf_attn", id="after", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_fresh_process_loads_it(imports, tmp_path):
    pipe = pixels()
    want = float(sample(pipe).double().sum())
    pipe.save_pretrained(tmp_path)
    code = f"""{imports}
import sys, torch
assert "hf_attn.models.lamamba_diff" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
pipe.set_progress_bar_config(disable=True)
out = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
print(float(out.double().sum()))
import diffusers
try:
    diffusers.NoSuchName
except AttributeError:
    print("unknown names stay unknown")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, line = done.stdout.splitlines()
    assert float(value) == pytest.approx(want, rel=1e-6) and line == "unknown names stay unknown"


def test_guidance():
    """Item 8: scale 1 is the conditional model; the variance channels are untouched."""
    both = torch.randn(4, 8, 4, 4)
    got = guided(both, 4, 1.0)
    torch.testing.assert_close(got[:2, :4], both[:2, :4])
    strong = guided(both, 4, 3.0)
    assert torch.equal(strong[:, 4:], both[:, 4:]) and torch.equal(strong[:2, :4], strong[2:, :4])
    torch.testing.assert_close(strong[:2, :4], both[2:, :4] + 3 * (both[:2, :4] - both[2:, :4]))
    pipe = pixels()
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    plain = sample(pipe, guidance_scale=1.0)
    assert seen == [[1, 2]] * 2
    assert not torch.equal(sample(pipe, guidance_scale=2.0), plain)
    assert seen[2:] == [[1, 2, 5, 5]] * 2


def test_learned_variance_and_other_schedulers():
    model = tiny(in_channels=1, out_channels=2, sample_size=8)
    learned = DDPMScheduler(variance_type="learned_range")
    pipe = hf_attn.LaMambaDiffPipeline(transformer=model, vae=None, scheduler=learned)
    first = sample(pipe)
    with torch.no_grad():
        model.head.proj.bias[1] += 5.0  # the variance channel
    assert not torch.equal(sample(pipe), first)
    for scheduler in (DDPMScheduler(), EulerDiscreteScheduler()):
        images = sample(hf_attn.LaMambaDiffPipeline(transformer=model, vae=None, scheduler=scheduler))
        assert images.isfinite().all()
    with pytest.raises(ValueError, match="variance_type='learned_range', but the model predicts the noise only"):
        pixels(learned)


def test_unconditional():
    pipe = pixels(num_classes=0, class_dropout_prob=1.0)
    assert torch.equal(sample(pipe, (0, 0), guidance_scale=4.0), sample(pipe, (0, 0), guidance_scale=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    want, images = sample(pixels()), sample(pixels().to(dtype), latents=None)
    assert images.dtype == dtype and images.isfinite().all() and images.shape == want.shape


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([6], {}, "class_labels must be integers from 0 to 5"),
        ([], {}, "class_labels must be integers"),
        ([1], {"output_type": "jpeg"}, "output_type must be one of"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1"),
        ([1], {"latents": torch.zeros(2, 1, 8, 8)}, "latents must be"),
    ],
)
def test_bad_input(labels, options, message):
    with pytest.raises(ValueError, match=message):
        pixels()(labels, **options)


PUSHED = """
import torch, hf_attn
from tests.models.test_lamamba_pipeline import pixels, sample
pipe = pixels()
pipe.push_to_hub("me/digits")
pipe.transformer.push_to_hub("me/denoiser")
print(float(sample(pipe).double().sum()))
"""
PULLED = """
import torch, hf_attn
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/digits")
assert type(pipe) is hf_attn.LaMambaDiffPipeline and pipe.vae is None
pipe.set_progress_bar_config(disable=True)
out = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
again = hf_attn.LaMambaDiffTransformer2DModel.from_pretrained("me/denoiser")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pipe.transformer.parameters(), strict=True))
print(float(out.double().sum()))
"""


@pytest.mark.slow
def test_push_and_pull(loopback):
    """Pushed and loaded by two processes, through a Hub on this machine."""
    hub, environment = loopback
    sums = [run_python(code, environment) for code in (PUSHED, PULLED)]
    assert {"model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(hub.repos["me/digits"].files)
    assert float(sums[0].splitlines()[-1]) == float(sums[1].splitlines()[-1])


def test_the_example_draws(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "lamamba_sample.py"
    monkeypatch.setattr(sys, "argv", ["lamamba_sample.py", "--output", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(script))
    printed = capsys.readouterr().out
    assert "LaMambaDiffPipeline: 4 images of (8, 8)" in printed and (tmp_path / "3_class3.png").is_file()
    options = ["--pipeline", str(tmp_path / "pipeline"), "--classes", "7", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lamamba_sample.py", *options, "--steps", "1"])
    runpy.run_path(str(script))
    assert (tmp_path / "0_class7.png").is_file()
