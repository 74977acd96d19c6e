"""PSA in tiny pipelines: dense where asked, in every class; sparse and counted, with and without guidance."""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch
from diffusers import WanTransformer3DModel

import hf_attn
from tests.integrations.diffusers.tiny import PIPELINES, build, close

SIZE = {"height": 64, "width": 96}  # a grid of 3 x 4 x 6 tokens
OPTIONS = {"block_size": 8, "min_tokens": 0, "dense_steps": 0}


@pytest.fixture(params=["wan", "cogvideox"])
def tiny(request):
    return build(request.param)


def test_warm_up_of_all_steps_changes_nothing(tiny):
    want = tiny.run(**SIZE)
    hf_attn.apply(tiny.target, "psa", **{**OPTIONS, "dense_steps": tiny.steps})
    assert torch.equal(tiny.run(**SIZE), want)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert totals["dense_calls"] == totals["calls"] == tiny.calls


@pytest.mark.parametrize("name", PIPELINES)
def test_level_one_everywhere_is_dense(name):
    tiny = build(name, layers=1)
    want = tiny.run()
    hf_attn.apply(tiny.target, "psa", bounds=(1.0, 1.0, 1.0, 1.0), strict=True, **OPTIONS)
    assert close(tiny.run(), want)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert (totals["calls"], totals["sparse_calls"]) == (tiny.calls, tiny.calls)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 12}, "block_k must be a multiple of 8 .*, got 12"),
        ({"block_k": 20}, "block_k must be a multiple of 8 .*, got 20"),
        ({"preset": "wan2.1"}, "unknown preset 'wan2.1'"),
        ({"bounds": (0.5, 0.4, 0.6, 0.8)}, "bounds must be four rising numbers"),
    ],
)
def test_bad_options_change_nothing(options, message):
    tiny = build("wan")
    stock = tiny.model.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=message):
        hf_attn.apply(tiny.target, "psa", **options)
    assert tiny.model.blocks[0].attn1.processor is stock


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_sparse_steps_are_counted_and_repeat_bit_by_bit(tiny, guidance):
    want = tiny.run(**SIZE, guidance_scale=guidance)
    hf_attn.apply(tiny.target, "psa", density=0.5, **OPTIONS)
    first = tiny.run(**SIZE, guidance_scale=guidance)
    stats = hf_attn.stats(tiny.target)
    assert stats["totals"]["fallbacks"] == stats["totals"]["dense_calls"] == 0
    for layer in stats["layers"].values():
        assert layer["calls"] >= tiny.steps and 0.2 < layer["density"] < 0.95
    assert first.isfinite().all() and (first - want).abs().max() > 1e-6
    assert torch.equal(tiny.run(**SIZE, guidance_scale=guidance), first)
    hf_attn.remove(tiny.target)
    assert torch.equal(tiny.run(**SIZE, guidance_scale=guidance), want)


def wan_call(frames, height, width):
    """A Wan transformer of one layer with 4 heads x 128, and the arguments of a call on a grid of tokens."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=128, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=3072, num_layers=1,
    ).eval()  # fmt: skip
    return model, (torch.randn(1, 4, frames, 2 * height, 2 * width), torch.tensor([500]), torch.randn(1, 8, 16))


def test_without_options_2048_tokens_stay_dense():
    model, call = wan_call(8, 16, 16)
    with torch.inference_mode():
        want = model(*call)[0]
        hf_attn.apply(model, "psa")
        assert torch.equal(model(*call)[0], want)
    assert hf_attn.stats(model)["totals"]["dense_reasons"] == {"fewer than min_tokens=4096 tokens": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the number of denoising steps is unknown")
def test_without_options_8192_tokens_are_never_slower_than_stock():
    """Attention is the only difference, and saves a quarter of the call; the bar is 1.02."""
    (stock, call), (sparse, _) = wan_call(16, 16, 32), wan_call(16, 16, 32)
    hf_attn.apply(sparse, "psa")
    ratios = []
    with torch.inference_mode():
        for _ in range(6):
            seconds = []
            for model in (stock, sparse):
                start = time.perf_counter()
                model(*call)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
    assert hf_attn.stats(sparse)["totals"]["sparse_calls"] == 6
    assert median(ratios[1:]) <= 1.02, ratios
