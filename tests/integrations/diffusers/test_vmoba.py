"""VMoBA in tiny pipelines: dense phases, patterns by layer, guidance, two transformers, training, saved options."""

from __future__ import annotations

import json

import pytest
import torch

import hf_attn
from hf_attn.mechanisms.vmoba import VMoBAConfig
from tests.integrations.diffusers.tiny import build, close

SIZE = {"height": 64, "width": 96}  # a grid of 3 x 4 x 6 tokens
OPTIONS = {"min_tokens": 0, "dense_steps": 0}
pytestmark = pytest.mark.filterwarnings("ignore")


def test_all_steps_dense_changes_nothing():
    tiny = build("wan")
    want = tiny.run(**SIZE)
    hf_attn.apply(tiny.target, "vmoba", density=0.2, min_tokens=0, dense_steps=1.0)
    assert torch.equal(tiny.run(**SIZE), want)
    assert hf_attn.stats(tiny.target)["totals"]["dense_calls"] == tiny.calls


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_mixed_schedule_with_one_and_two_passes(name, guidance):
    tiny = build(name, layers=4)
    want = tiny.run(**SIZE, guidance_scale=guidance, num_inference_steps=4)
    hf_attn.apply(tiny.target, "vmoba", density=0.3, min_tokens=0, dense_steps=0.25)
    got = tiny.run(**SIZE, guidance_scale=guidance, num_inference_steps=4)
    found = hf_attn.stats(tiny.target)
    assert got.isfinite().all() and not torch.equal(got, want)
    assert found["totals"]["fallbacks"] == 0
    assert found["totals"]["dense_calls"] * 3 == found["totals"]["sparse_calls"]
    names = [next(iter(layer["paths"])) for layer in found["layers"].values()]
    assert [path[:2] for path in names] == ["1d", "2d", "3d", "1d"]
    for layer in found["layers"].values():
        assert 0.25 < layer["density"] < (0.35 if name == "wan" else 0.75)  # text is always read


def test_both_transformers_of_a_two_stage_model():
    tiny = build("wan", second=True)
    stock = tiny.run(num_inference_steps=4, **SIZE)
    hf_attn.apply(tiny.target, "vmoba", density=0.3, **OPTIONS)
    assert not close(tiny.run(num_inference_steps=4, **SIZE), stock, 1e-7)
    found = hf_attn.stats(tiny.target)
    assert set(found["layers"]) == {0, 1, "transformer_2.0", "transformer_2.1"}
    assert found["totals"]["sparse_calls"] == found["totals"]["calls"] == 2 * 2 * 4


def test_first_full_layer_and_saved_options():
    tiny = build("wan", layers=3)
    options = {"temporal_block": 1, "spatial_block": (2, 3), "st_block": [1, 2, 3], "select": "threshold"}
    hf_attn.apply(tiny.target, "vmoba", scope="head_global", tau=0.3, first_full_layer=1, **options, **OPTIONS)
    tiny.run(**SIZE)
    found = hf_attn.stats(tiny.target)
    paths = [next(iter(layer["paths"])) for layer in found["layers"].values()]
    assert paths == ["dense", "1d, 3 blocks", "2d, 4 blocks"]
    saved = json.loads(json.dumps(found["options"]))
    again = VMoBAConfig.from_dict(saved)
    assert again.to_dict() == found["options"] and again.spatial_block == (2, 3)


def test_training_with_a_lora_and_checkpointing():
    from peft import LoraConfig

    tiny = build("wan", layers=3)
    model = tiny.model.train()
    hf_attn.apply(model, "vmoba", select="threshold", scope="head_global", tau=0.25, **OPTIONS)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    inputs = torch.randn(2, 16, 3, 8, 12), torch.tensor([300.0, 700.0]), torch.randn(2, 4, 16)

    def gradients():
        model.zero_grad()
        model(*inputs, return_dict=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    assert plain and all(grad.isfinite().all() for grad in plain.values())
    assert all(grad.abs().max() > 0 for name, grad in plain.items() if "attn1" in name)
    model.enable_gradient_checkpointing()
    for name, grad in gradients().items():
        assert torch.allclose(grad, plain[name], atol=1e-6), name
    totals = hf_attn.stats(model)["totals"]
    assert totals["fallbacks"] == totals["dense_calls"] == 0
