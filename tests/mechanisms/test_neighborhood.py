"""Mechanism "neighborhood": windows on images and videos with text and padding, vision models, pipelines, bad input."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_attn
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.grid import TokenGrid
from hf_attn.mechanisms.neighborhood import MECHANISM, NeighborhoodConfig, windows_of
from tests.integrations.diffusers.tiny import build

VIDEO, IMAGE = TokenGrid(4, 6, 8, 3, 2), TokenGrid(1, 9, 7, 0, 5)


def make(grid, *, batch=2, heads=4, kv_heads=2, index=None, dtype=torch.float64):
    tensors = [torch.randn(batch, h, grid.length, 8, dtype=dtype) for h in (heads, kv_heads, kv_heads)]
    tokens = TokenLayout(batch, grid.length, grid.length, index, grid=grid)
    return AttentionCall(*tensors, 0.3, False, tokens, LayerContext(index=0))


def config(**options):
    return NeighborhoodConfig(**{"dense_steps": 0, **options})


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (VIDEO, {"kernel_size": (2, 3, 5)}),
        (VIDEO, {"kernel_size": (3, 4), "stride": (2, 2)}),
        (VIDEO, {"kernel_size": 3, "dilation": (1, 2, 2)}),
        (VIDEO, {"density": 0.2}),
        (IMAGE, {"kernel_size": 3}),
        (IMAGE, {"kernel_size": (5, 3), "stride": (2, 1)}),
        (TokenGrid(1, 5, 6), {"kernel_size": 3}),
    ],
)
def test_equals_masked_attention(grid, options, padded):
    index = None
    if padded:
        real = torch.ones(2, grid.length, dtype=torch.bool)
        real[0, -min(grid.text_after, 2) or grid.length :] = False
        real[1, : grid.text_before] = False
        position = torch.arange(grid.length).expand(2, -1)
        index = torch.stack([torch.where(real, 0, -1), position], 1).to(torch.int32).repeat(1, 1, 2)
    call, options = make(grid, index=index), config(**options)
    leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    out = MECHANISM(call, options)
    mask = MECHANISM.attended(call, options, torch.arange(grid.length))
    expected = scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.3, enable_gqa=True)
    rows = torch.ones(2, grid.length, dtype=torch.bool) if index is None else index[:, 0, : grid.length] >= 0
    expected = expected.masked_fill(~rows[:, None, :, None], 0)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(out) * rows[:, None, :, None]
    for mine, wanted in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (out, expected)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_counts_what_it_computes():
    found = {}
    call = make(VIDEO)
    options = config(kernel_size=(2, 3, 5))
    MECHANISM(replace(call, layer=replace(call.layer, record=found.update)), options)
    mask = MECHANISM.attended(call, options, torch.arange(VIDEO.length))
    assert found["path"] == "sparse" and found["computed"] == int(mask.sum()) * 2 * 4
    assert found["visible"] == VIDEO.length**2 * 2 * 4


def test_density_gives_windows_of_the_grid_s_proportions():
    windows = windows_of(TokenGrid(16, 32, 48), config(density=0.125))
    assert windows.kernel == (8, 16, 24)
    with pytest.warns(UserWarning, match="read whole"):
        assert windows_of(TokenGrid(2, 32, 48), config(kernel_size=5, stride=5)).kernel == (2, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 1}, "kernel_size must be an integer >= 2, got 1"),
        ({"kernel_size": (3, 3, 3, 3)}, "must have 2 .* or 3 .* entries"),
        ({"kernel_size": 3, "density": 0.5}, "give kernel_size, or density / schedule, not both"),
        ({"kernel_size": 3, "grid": 7}, "grid must be \\(height, width\\)"),
        ({"kernel_size": 3, "prefix_tokens": 1}, "prefix_tokens=1 needs grid"),
        ({"kernel_size": 3, "stride": 0}, "stride must be an integer >= 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodConfig(**options)


def test_calls_that_cannot_work_say_why():
    call = make(IMAGE)
    with pytest.raises(ValueError, match="is causal; for language models use 'streaming'"):
        MECHANISM(replace(call, causal=True), config(kernel_size=3))
    with pytest.raises(ValueError, match="exceeds the 9 tokens along height of the grid 1x9x7"):
        MECHANISM(call, config(kernel_size=11, strict=True))
    with pytest.raises(ValueError, match="kernel_size 5 \\* dilation 2 = 10 exceeds the 9 tokens along height"):
        MECHANISM(call, config(kernel_size=5, dilation=2))
    with pytest.raises(ValueError, match="stride along height must be from 1 to kernel_size=3, got 4"):
        MECHANISM(call, config(kernel_size=3, stride=4))
    flat = replace(call, tokens=TokenLayout.full(2, IMAGE.length))
    with pytest.raises(ValueError, match="needs the grid of the 68 tokens.*pass grid="):
        MECHANISM(flat, config(kernel_size=3))
    with pytest.raises(ValueError, match="grid 1x8x8 with 3 tokens before .* describes 67 tokens, but .* has 68"):
        MECHANISM(flat, config(kernel_size=3, grid=(8, 8), prefix_tokens=3))


def test_a_vision_transformer_with_a_class_token():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(pixels).last_hidden_state
        hf_attn.apply(model, "neighborhood", kernel_size=8, grid=(8, 8), prefix_tokens=1)
        torch.testing.assert_close(model(pixels).last_hidden_state, dense, rtol=1e-4, atol=1e-5)
        hf_attn.apply(model, "neighborhood", kernel_size=3, grid=(8, 8), prefix_tokens=1)
        hf_attn.reset_stats(model)
        near = model(pixels).last_hidden_state
    assert not torch.allclose(near, dense, atol=1e-3)
    found = hf_attn.stats(model)["totals"]
    assert found["density"] == pytest.approx((64 * 9 + 2 * 64 + 1) / 65**2)
    model.train()
    model(pixels).last_hidden_state.sum().backward()
    hf_attn.apply(model, "neighborhood", kernel_size=3, grid=(7, 8), prefix_tokens=1)
    with pytest.raises(ValueError, match="describes 57 tokens, but the sequence has 65"):
        model(pixels)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_pipeline(name):
    tiny = build(name)
    stock = tiny.run()
    axes = [n for n in tiny.grid if n > 1]
    hf_attn.apply(tiny.target, "neighborhood", kernel_size=tuple(max(n, 2) for n in tiny.grid), dense_steps=0)
    torch.testing.assert_close(tiny.run(), stock, rtol=1e-4, atol=1e-4)
    hf_attn.remove(tiny.target)
    hf_attn.apply(tiny.target, "neighborhood", kernel_size=2, dense_steps=0)
    near = tiny.run()
    found = hf_attn.stats(tiny.target)["totals"]
    assert near.isfinite().all() and not torch.allclose(near, stock, atol=1e-4)
    assert found["fallbacks"] == 0 and found["dense_calls"] == 0
    if not tiny.text:
        assert found["density"] == pytest.approx(2 ** len(axes) / torch.tensor(axes).prod().item())
    hf_attn.remove(tiny.target)
    assert torch.equal(tiny.run(), stock)


def test_example():
    command = [sys.executable, "examples/neighborhood_video.py", "--grid", "4x8x8", "--kernel", "2x3x3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7.0% of the pairs" in done.stdout and done.stdout.count("#") == 8
