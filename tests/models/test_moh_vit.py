"""ViT with Mixture-of-Head attention: conversion from memory, disk and the command line, skipping, saving, training."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli.app import app
from hf_attn.models.cards import write_model_card
from hf_attn.models.moh.calibration import attentions, measure_heads

PIXELS = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))  # 25 patches and the class token


def vit(kind=ViTForImageClassification):
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=20,
        patch_size=4, num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    return kind(config).eval()


def convert(base, **options):
    return hf_attn.convert(base, "moh", **{"shared_heads": 2, "top_k": 1, "pixels": PIXELS, **options}).eval()


@torch.no_grad()
def output(model):
    return model(PIXELS)[0]


@pytest.mark.parametrize("path", ["reference", "torch", None])
@pytest.mark.parametrize("router", ["query_norm", "learned"])
@pytest.mark.parametrize("kind", [ViTForImageClassification, ViTModel])
def test_all_heads_are_the_base(kind, router, path, monkeypatch):
    if path:
        monkeypatch.setenv("HF_ATTN_BACKEND", path)
    base = vit(kind)
    want = output(base)
    whole = convert(base, top_k=2, router=router)
    assert type(whole).__name__ == f"MoH{kind.__name__}"
    torch.testing.assert_close(output(whole), want, rtol=0, atol=1e-5)
    fewer = convert(base, router=router)
    assert (output(fewer) - want).abs().max() > 1e-3
    got = output(fewer)
    for implementation in ("sdpa", "eager"):
        fewer.set_attn_implementation(implementation)
        torch.testing.assert_close(output(fewer), got, rtol=0, atol=1e-5)


def test_every_token_sees_all_others():
    """Bidirectional: the class token, the first one, feels the last patch."""
    model = convert(vit())
    moved = PIXELS.clone()
    moved[..., -4:, -4:] += 1
    with torch.no_grad():
        assert (model(moved).logits - model(PIXELS).logits).abs().max() > 1e-3
    assert model.activated_heads == 3 / 4
    assert [sum(load) for load in model.head_load()] == pytest.approx([1, 1])


def test_shared_heads_are_those_that_contribute_most():
    base = vit()
    model = convert(base)
    with torch.no_grad():
        found = measure_heads(base, PIXELS, features=False)
        attention = next(iter(attentions(base).values()))
        seen = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].unflatten(-1, (4, 8))))
        base(PIXELS)
        handle.remove()
        weight = attention.o_proj.weight.unflatten(1, (4, 8))
        length = torch.einsum("bnhd,ohd->bnho", seen[0], weight).norm(dim=-1).sum((0, 1))
    torch.testing.assert_close(found[0].contribution, length, rtol=1e-4, atol=1e-4)
    assert model.config.moh_shared_heads[0] == sorted(length.topk(2).indices.tolist())


def test_save_and_load(tmp_path):
    for kind, auto in ((ViTForImageClassification, AutoModelForImageClassification), (ViTModel, AutoModel)):
        model = convert(vit(kind), router="learned")
        folder = tmp_path / kind.__name__
        model.save_pretrained(folder)
        for options in ({}, {"trust_remote_code": True}):
            again = auto.from_pretrained(folder, **options)
            assert again.config.moh_shared_heads == model.config.moh_shared_heads
            assert torch.equal(output(again), output(model))
    write_model_card(tmp_path / "ViTForImageClassification")
    card = (tmp_path / "ViTForImageClassification" / "README.md").read_text()
    assert "AutoModelForImageClassification.from_pretrained(" in card and "pipeline_tag: image-classification" in card


def test_from_disk(tmp_path):
    """A folder by `hf_attn.convert` and by the command line: the host renames its weights when it loads them."""
    base = vit()
    base.save_pretrained(tmp_path / "base")
    options = {"shared_heads": [0, 3], "top_k": 1}
    want = hf_attn.convert(base, "moh", **options).eval()
    loaded = hf_attn.convert(tmp_path / "base", "moh", **options)
    assert torch.equal(output(loaded), output(want)) and not loaded.training
    command = ["convert", str(tmp_path / "base"), "moh", "--option", "shared_heads=[0, 3]", "--option", "top_k=1"]
    planned = CliRunner().invoke(app, [*command, "--dry-run"])
    assert planned.exit_code == 0 and "ViTForImageClassification -> MoHViTForImageClassification" in planned.output
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path / "ours")]).exit_code == 0
    written = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(output(written), output(want)) and written.config.id2label == base.config.id2label


def test_training(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    model = convert(vit(), router="learned").train()
    out = model(PIXELS, labels=torch.tensor([0, 1, 4]))
    plain = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 4]))
    torch.testing.assert_close(out.loss, plain + 0.01 * out.aux_loss)
    out.loss.backward()
    grads = [attention.router.wg.weight.grad for attention in attentions(model).values()]
    assert all(grad.abs().sum() > 0 for grad in grads)
    torch.testing.assert_close(model.eval()(PIXELS, labels=torch.tensor([0, 1, 4])).loss, plain, rtol=1e-5, atol=1e-6)


def test_adapter_round_trip(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        convert(vit(), router="learned"), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["router"])
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight) * 0.1)
    want = output(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(hf_attn.load_adapter(vit(), tmp_path).eval()), want)
    torch.testing.assert_close(output(model.merge_and_unload().eval()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": None}, "a ViT is calibrated on images: pass pixels="),
        ({"pixels": PIXELS[0]}, "a ViT is calibrated on images"),
        ({"tokens": torch.ones(1, 4, dtype=torch.long)}, "a ViT is calibrated on images"),
        ({"top_k": 3}, "moh_top_k must be an integer from 0 to the 2 routed heads"),
        ({"shared_heads": [0, 4]}, "moh_shared_heads must hold head indices from 0 to 3, got 4"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        convert(vit(), **options)


def test_other_kinds_of_vit_are_refused():
    with pytest.raises(ValueError, match="takes ViTForImageClassification or ViTModel, got ViTForMaskedImageModeling"):
        convert(vit(ViTForMaskedImageModeling))
