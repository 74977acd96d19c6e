"""DiT with Mixture-of-Head attention: published variants, conversion, saving, the pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import hf_attn
from hf_attn.models.moh_dit import VARIANTS, MoHDiTTransformer2DModel, activated_share

SHARES = {
    "XL/2-90": 90.0, "XL/2-75": 75.0, "L/2-90": 89.6, "L/2-75": 75.0, "B/2-90": 89.6, "B/2-75": 75.0, "S/2-90": 88.9,
    "S/2-75": 75.0,
}  # fmt: skip
SMALL = {
    "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000,
}  # fmt: skip
INPUTS = {"timestep": torch.tensor([1]), "class_labels": torch.tensor([2])}


def base():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants(name):
    """Item 10: the share of activated heads is that of the paper's table."""
    assert 100 * activated_share(VARIANTS[name]) == pytest.approx(SHARES[name], abs=0.05)


@torch.no_grad()
def test_conversion_and_saving(tmp_path):
    source, latents = base(), torch.randn(1, 4, 8, 8)
    want = source(latents, **INPUTS).sample
    whole = hf_attn.convert(source, "moh", shared_heads=2, top_k=2)
    for name, weight in whole.named_parameters():
        if "router" in name:
            weight.zero_()
    torch.testing.assert_close(whole(latents, **INPUTS).sample, want, rtol=0, atol=1e-5)
    model = hf_attn.convert(base(), "moh", shared_heads=2, top_k=1)
    got = model(latents, **INPUTS).sample
    assert model.activated_heads == 0.75 and (got - want).abs().max() > 1e-4
    assert 0 < float(model.load_balance_loss()) < 2
    model.save_pretrained(tmp_path)
    again = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(latents, **INPUTS).sample, got)


@torch.no_grad()
def test_loads_in_the_pipeline(tmp_path):
    """Other numbers of heads in every layer, as published."""
    torch.manual_seed(0)
    transformer = MoHDiTTransformer2DModel(**SMALL, out_channels=8, moh_layers=[[2, 2, 0], [6, 3, 1]]).eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is MoHDiTTransformer2DModel
    images = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        images.append(
            each([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        )
    assert (images[0] == images[1]).all()


def test_bad_options():
    with pytest.raises(ValueError, match="moh_layers must have one entry for each of the 2 layers, got 1"):
        MoHDiTTransformer2DModel(**SMALL, moh_layers=[[4, 2, 1]])
    with pytest.raises(ValueError, match="moh_top_k must be an integer from 0 to the 2 routed heads"):
        hf_attn.convert(base(), "moh", shared_heads=2, top_k=3)
    with pytest.raises(ValueError, match="has no option 'router'"):
        hf_attn.convert(base(), "moh", router="learned")
