"""User mistakes raise; calls that do not fit run dense, counted and warned once, or raise under strict."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

import hf_attn
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import build, close


def test_unsupported_targets():
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    with pytest.raises(TypeError, match="AutoencoderKL has no transformer or U-Net of a supported class.*WanTransf"):
        hf_attn.apply(vae, "band")
    model = UNet2DModel(block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                        norm_num_groups=1)  # fmt: skip
    with pytest.raises(TypeError, match="UNet2DModel has no transformer"):
        hf_attn.stats(model)


def test_bad_names_options_and_layers_change_nothing():
    tiny = build("wan")
    stock = [block.attn1.processor for block in tiny.model.blocks]
    for options, error, message in [
        ({"name": "bnd"}, ValueError, "unknown mechanism 'bnd' .did you mean 'band'"),
        ({"name": "moba"}, ValueError, "'moba' does not support diffusers models; mechanisms that do: .*band"),
        ({"densty": 0.3}, ValueError, "no option 'densty' .did you mean 'density'"),
        ({"density": 0.0}, ValueError, r"density must be a number in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must be a number in \(0, 1\], got 1.5"),
        ({"dense_steps": -1}, ValueError, "dense_steps must be an integer >= 0, got -1"),
        ({"dense_steps": 1.5}, ValueError, "dense_steps as a share of the steps must lie in 0 to 1, got 1.5"),
        ({"min_tokens": 0.5}, ValueError, "min_tokens must be an integer >= 0, got 0.5"),
        ({"schedule": []}, ValueError, "schedule must be a list of densities"),
        ({"schedule": [1.0, 2.0]}, ValueError, r"schedule\[1\] must be a number in \(0, 1\], got 2.0"),
        ({"strict": 1}, ValueError, "strict must be True or False, got 1"),
        ({"layers": {7: None}}, ValueError, "layers names layer 7, but the model has 2 layers"),
    ]:
        with pytest.raises(error, match=message):
            hf_attn.apply(tiny.target, options.pop("name", "band"), **options)
    assert [block.attn1.processor for block in tiny.model.blocks] == stock
    assert "step" not in vars(tiny.target.scheduler)


def test_applying_twice_names_the_way_out():
    tiny = build("flux")
    hf_attn.apply(tiny.target, "band")
    for target in (tiny.target, tiny.model):
        with pytest.raises(ValueError, match=r"already uses 'band'; call hf_attn.remove\(\.\.\.\) first"):
            hf_attn.apply(target, "band", density=0.5)
    hf_attn.apply(hf_attn.remove(tiny.target), "band", density=0.5)


def test_ring_attention_is_refused_before_and_after():
    tiny = build("wan")
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    processor = tiny.model.blocks[0].attn1.processor
    processor._parallel_config = config
    with pytest.raises(ValueError, match="ring_degree=2.*ContextParallelConfig.ulysses_degree"):
        hf_attn.apply(tiny.target, "band")
    processor._parallel_config = None
    hf_attn.apply(tiny.target, "band", **SMALL)
    tiny.model.blocks[0].attn1.processor._parallel_config = config
    with pytest.raises(ValueError, match="cannot run under ring attention"):
        tiny.run()


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_grid_runs_dense_or_raises(strict):
    tiny = build("ltx")
    inputs = []
    handle = tiny.model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    tiny.run()
    handle.remove()
    with torch.no_grad():
        stock = tiny.model(**inputs[0])[0]
    hf_attn.apply(tiny.model, "band", density=0.3, strict=strict, **SMALL)
    # The packed input hides its shape: a transposed size is found out, as here, only when its product differs.
    wrong = {**inputs[0], "height": inputs[0]["height"] + 1, "rope_interpolation_scale": None}
    wrong["video_coords"] = torch.zeros(stock.shape[0], 3, stock.shape[1])
    message = "attends over 18 tokens, but the model's arguments tell a grid of 3x3x3"
    with torch.no_grad():
        if strict:
            with pytest.raises(ValueError, match=message):
                tiny.model(**wrong)
            return
        with pytest.warns(UserWarning, match=message):
            tiny.model(**wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.model(**wrong)
        totals = hf_attn.stats(tiny.model)["totals"]
        assert (totals["fallbacks"], totals["sparse_calls"]) == (4, 0)
        assert any(message in reason for reason in totals["fallback_reasons"])


def test_a_mask_that_is_more_than_padding_runs_dense():
    tiny = build("ltx2")
    if "video_self_attention_mask" not in inspect.signature(type(tiny.model).forward).parameters:
        pytest.skip("no model of diffusers 0.38 takes such a mask")
    mask = torch.ones(1, 48, 48)
    mask[:, :, 40:] = 0
    stock = tiny.run(video_self_attention_mask=mask)
    hf_attn.apply(tiny.model, "band", density=0.3, **SMALL)
    with pytest.warns(UserWarning, match="is more than padding of the keys; such calls run dense"):
        assert close(tiny.run(video_self_attention_mask=mask), stock)
    assert hf_attn.stats(tiny.model)["totals"]["fallbacks"] == 2


def test_replaced_processors_are_noticed_once():
    tiny = build("cogvideox")
    hf_attn.apply(tiny.target, "band", density=0.3, **SMALL)
    tiny.model.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="2 of 2 attention processors.*replaced by FusedCogVideoXAttnProcessor2_0"):
        tiny.run()
    assert hf_attn.stats(tiny.target)["totals"]["calls"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run()
    hf_attn.remove(tiny.target)
    assert type(tiny.model.transformer_blocks[0].attn1.processor).__name__ == "FusedCogVideoXAttnProcessor2_0"
    hf_attn.apply(tiny.target, "band", density=0.3, **SMALL)
    tiny.run()
    assert hf_attn.stats(tiny.target)["totals"]["sparse_calls"] == tiny.calls


def test_dropout_is_refused():
    tiny = build("flux")
    hf_attn.apply(tiny.target, "band", **SMALL)
    from hf_attn.integrations.diffusers.processors import site_call

    site = tiny.model.transformer_blocks[0].attn.processor
    q = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match="does not support attention dropout, got dropout_p=0.1"):
        site_call(site, q, q, q, None, 0.1, None)


def test_a_processor_without_sdpa_is_refused():
    tiny = build("pixart")
    tiny.model.set_default_attn_processor()
    with pytest.raises(ValueError, match="has a AttnProcessor, which calls neither the attention dispatcher"):
        hf_attn.apply(tiny.target, "band")
