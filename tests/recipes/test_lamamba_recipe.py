"""Digits: the recipe's `--smoke`, resuming, the judge; the training of denoisers and its variational term."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from PIL import Image

from hf_attn import LaMambaDiffPipeline, LaMambaDiffTransformer2DModel
from hf_attn.training import denoising, digits
from tests.models.test_lamamba_diff import tiny
from tests.recipes.test_moba_recipes import RECIPES, smoke

pytest.importorskip("sklearn")


def test_smoke(tmp_path, monkeypatch, capsys):
    smoke("lamamba_digits", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["judge", "recognised", "copying", "loss_at_start", "loss"]
    assert results["loss"] < results["loss_at_start"] - 0.2 and results["judge"] > 0.85
    assert "| copying |" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (400, 80) and (tmp_path / "curve.png").is_file()
    assert LaMambaDiffPipeline.from_pretrained(tmp_path / "pipeline").vae is None
    # Without its pipeline the run goes on from the last checkpoint, which is that of the end.
    shutil.rmtree(tmp_path / "pipeline")
    smoke("lamamba_digits", tmp_path, monkeypatch)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again == pytest.approx(results, rel=1e-5)


def test_every_option_is_commented():
    lines = (RECIPES / "lamamba_digits" / "config.yaml").read_text().splitlines()
    sections = yaml.safe_load("\n".join(lines))
    plain = {"in_channels", "sample_size", "num_classes", "bottleneck_depth", "num_heads", "num_train_timesteps"}
    plain |= {"beta_schedule", "variance_type", "steps", "batch_size", "learning_rate", "weight_decay", "warmup"}
    for name, value in sections.items():
        line = next(line for line in lines if line.startswith(f"{name}:"))
        assert "#" in line or isinstance(value, dict), line
        for option in value if isinstance(value, dict) else ():
            line = next(line for line in lines if line.startswith(f"  {option}:"))
            assert "#" in line or option in plain, line


def test_an_interrupted_training_goes_on_with_the_same_numbers(tmp_path):
    data = digits.load_digits()
    options = {"steps": 6, "batch_size": 4, "warmup": 1, "save_every": 2, "learning_rate": 1e-3}
    scheduler = DDPMScheduler()

    def model():
        return tiny(in_channels=1, out_channels=2, num_classes=10, depths=[1, 0, 0, 0], bottleneck_depth=0)

    whole = model()
    want = denoising.train_denoiser(whole, scheduler, data.images, data.labels, **options)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        denoising.train_denoiser(model(), scheduler, data.images, data.labels, folder=tmp_path, report=stop, **options)
    resumed = model()
    got = denoising.train_denoiser(resumed, scheduler, data.images, data.labels, folder=tmp_path, **options)
    assert got == pytest.approx(want, rel=1e-5)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_variational_term_is_a_divergence():
    """0 for the true noise with the posterior's variance; with beta instead, the known divergence of two variances."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    images, noise = torch.rand(3, 1, 8, 8) * 1.8 - 0.9, torch.randn(3, 1, 8, 8)
    times = torch.tensor([1, 400, 999])
    noisy = scheduler.add_noise(images, noise, times)
    exact = denoising.variational_term(scheduler, images, noisy, times, torch.cat([noise, -torch.ones_like(noise)], 1))
    torch.testing.assert_close(exact, torch.zeros(3), rtol=0, atol=2e-3)
    wide = denoising.variational_term(scheduler, images, noisy, times, torch.cat([noise, torch.ones_like(noise)], 1))
    alphas = scheduler.alphas_cumprod
    ratio = ((1 - alphas[times - 1]) / (1 - alphas[times])).double()
    torch.testing.assert_close(
        wide.double(), 0.5 * (ratio - 1 - ratio.log()) / torch.log(torch.tensor(2.0)).double(), rtol=1e-2, atol=2e-3
    )
    predicted = torch.cat([noise, torch.zeros_like(noise)], 1).requires_grad_()
    denoising.variational_term(scheduler, images, noisy, torch.tensor([0, 5, 9]), predicted).sum().backward()
    assert (predicted.grad[:, 0] == 0).all() and (predicted.grad[:, 1] != 0).any() and predicted.grad.isfinite().all()


def test_judge_and_distances():
    data = digits.load_digits()
    assert len(data.labels) == 1437 and len(data.held_out_labels) == 360
    assert float(data.images.min()) == -1 and float(data.images.max()) == 1
    judge = digits.train_judge(data, epochs=4)
    measured = digits.quality(data.held_out_images, data.held_out_labels, data, judge)
    assert measured["judge"] == measured["recognised"] > 0.95 and measured["copying"] == 1
    copies = digits.quality(data.images[:50], (data.labels[:50] + 1) % 10, data, judge)
    assert copies["copying"] == 0 and copies["recognised"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mixers, steps", [("both", 1000), ("scan", 500), ("attention", 500)])
def test_latents_of_four_classes(mixers, steps):
    """Item 9 of the specification: the loss falls below 40 %, and guided samples are nearest to their class's mean.

    Classes are colours: one of four says log 4 = 1.4 nats of 1024 values, 2e-4 of the loss, which patterns of single
    pixels do not bring through the gradient within minutes. Samples are drawn with DDPM, whose noise undoes small
    errors; DDIM keeps them.
    """
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    means = 0.5 * signs[:, :, None, None].expand(4, 4, 16, 16)
    labels = torch.arange(256) % 4
    latents = means[labels] + 0.1 * torch.randn(256, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = LaMambaDiffTransformer2DModel(
        sample_size=16,
        out_channels=4,
        num_classes=4,
        base_channels=8,
        num_heads=2,
        window_size=4,
        depths=[1, 1, 0, 0],
        bottleneck_depth=0,
        ssm_state_size=1,
        mixers=mixers,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    losses = denoising.train_denoiser(
        model, scheduler, latents, labels, steps=steps, batch_size=16, learning_rate=3e-3, warmup=20, ema=0.98
    )
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20]) and sum(losses[-20:]) < 0.4 * 20  # predicting zero costs 1
    pipe = LaMambaDiffPipeline(transformer=model, vae=None, scheduler=scheduler)
    asked = labels[:32]
    drawn = pipe(
        asked.tolist(),
        guidance_scale=4.0,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    nearest = (drawn[:, None] - means).square().flatten(2).sum(2).argmin(1)
    assert (nearest == asked).float().mean() >= 0.8
