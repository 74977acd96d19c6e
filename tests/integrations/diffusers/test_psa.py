"""PSA in tiny Wan and CogVideoX pipelines: dense where asked, sparse and counted with and without guidance."""

from __future__ import annotations

import pytest
import torch

import hf_attn
from tests.integrations.diffusers.tiny import build, close

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


def test_level_one_everywhere_is_dense(tiny):
    want = tiny.run(**SIZE)
    hf_attn.apply(tiny.target, "psa", bounds=(1.0, 1.0, 1.0, 1.0), **OPTIONS)
    assert close(tiny.run(**SIZE), want)
    assert hf_attn.stats(tiny.target)["totals"]["dense_calls"] == 0


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
