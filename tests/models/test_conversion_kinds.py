"""Conversions of models that are no causal language models, and of systems that look at or rewrite the base."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification, ViTForImageClassification, ViTModel

import hf_attn
from hf_attn.models import CONVERSIONS
from hf_attn.models import conversion as conversion_module
from hf_attn.models.record import read_record
from tests.integrations.transformers.tiny import tokens
from tests.models.families import host

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def extra_conversion(monkeypatch):
    monkeypatch.setitem(CONVERSIONS, "extra", "tests.models.other_kinds")


def vit(kind):
    config = AutoConfig.for_model(
        "vit",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    return kind(config).eval()


def dit(**options):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", [ViTForImageClassification, ViTModel])
@torch.no_grad()
def test_a_model_type_of_several_kinds(kind, tmp_path):
    source = vit(kind)
    model = hf_attn.convert(source, "extra", width=3)
    assert type(model).__name__ == f"Extra{kind.__name__}" and model.extra.weight.shape == (3, 3)
    pixels = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(pixels)[0], source(pixels)[0])
    source.save_pretrained(tmp_path)
    loaded = hf_attn.convert(tmp_path, "extra", width=3)
    assert type(loaded) is type(model) and torch.equal(loaded(pixels)[0], source(pixels)[0])
    assert read_record(loaded.config)["fields"] == {"width": 3} and read_record(loaded.config)["base_type"] == "vit"


@torch.no_grad()
def test_a_model_of_diffusers(tmp_path):
    source = dit()
    model = hf_attn.convert(source, "extra", width=3)
    assert type(model).__name__ == "ExtraDiT" and model.extra.weight.shape == (3, 3)
    assert not any(p.is_meta for p in model.parameters()) and model.config["width"] == 3
    inputs = {"timestep": torch.tensor([1]), "class_labels": torch.tensor([2])}
    latents = torch.randn(1, 4, 8, 8)
    want = source(latents, **inputs).sample
    assert torch.equal(model(latents, **inputs).sample, want)
    assert model.proj_out_2.weight is source.proj_out_2.weight
    record = read_record(model.config)
    assert record["fields"] == {"width": 3} and record["base_type"] == "DiTTransformer2DModel"
    source.save_pretrained(tmp_path / "host")
    loaded = hf_attn.convert(tmp_path / "host", "extra", width=3)
    assert torch.equal(loaded(latents, **inputs).sample, want)
    loaded.save_pretrained(tmp_path / "ours")
    again = type(loaded).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(latents, **inputs).sample, want) and read_record(again.config) == read_record(
        loaded.config
    )


def test_the_kind_of_a_class_that_does_not_inherit():
    source = LlamaForSequenceClassification(host("llama").config)
    conversion = conversion_module.get_conversion("extra")
    assert conversion.model_class(source.config, type(source)).__name__ == "Standalone"
    assert conversion.model_class(source.config).__name__ == "ExtraLlamaForCausalLM"
    with pytest.raises(ValueError, match="takes LlamaForCausalLM or LlamaForSequenceClassification, got LlamaModel"):
        hf_attn.convert(host("llama").model, "extra")


def test_a_conversion_that_looks_at_the_base(tmp_path):
    source = host("llama").train()
    want = float(next(iter(source.parameters())).detach().double().sum())
    model = hf_attn.convert(source, "extra", look=True)
    assert source.training and model.training
    assert model.extra.weight.detach().flatten().tolist() == pytest.approx([want] * 4)
    source.save_pretrained(tmp_path)
    loaded = hf_attn.convert(tmp_path, "extra", look=True)
    torch.testing.assert_close(loaded.extra.weight, model.extra.weight)
    assert read_record(loaded.config)["options"] == {"look": True} and not loaded.training


@torch.no_grad()
def test_a_conversion_that_rewrites_weights(monkeypatch, tmp_path):
    from tests.models import other_kinds

    monkeypatch.setattr(other_kinds, "CONVERSION", other_kinds.REWRITING)
    source = host("llama", tie_word_embeddings=True)
    before = source.model.embed_tokens.weight.clone()
    source.save_pretrained(tmp_path)
    for model in (hf_attn.convert(source, "extra"), hf_attn.convert(tmp_path, "extra")):
        assert torch.equal(model.model.embed_tokens.weight, 2 * before)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(source.model.embed_tokens.weight, before)
    assert model(tokens(1, 4)).logits.isfinite().all()


def test_new_weights_of_wrong_names_and_shapes_are_refused():
    model = hf_attn.convert(host("llama"), "extra")
    with pytest.raises(ValueError, match="has no parameter 'extra.bais'"):
        conversion_module.set_weights(model, {"extra.bais": torch.ones(2)})
    with pytest.raises(ValueError, match=r"extra.weight has shape \[2, 2\], got values of shape \[3\]"):
        conversion_module.set_weights(model, {"extra.weight": torch.ones(3)})
    source = host("llama")
    source.model.probe = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has a module 'model.probe' that ExtraLlamaForCausalLM has not"):
        hf_attn.convert(source, "extra")


def test_the_record_survives_saving(tmp_path):
    model = hf_attn.convert(host("llama"), "moba", block_size=4, top_k=2, layers={"-1": None})
    model.save_pretrained(tmp_path)
    record = read_record(AutoConfig.from_pretrained(tmp_path))
    assert record == read_record(model.config)
    assert record["name"] == "moba" and record["options"] == {"block_size": 4, "top_k": 2, "layers": {"-1": None}}
    assert record["fields"]["kconv_layers"] == [0] and record["fields"]["hf_attn"]["top_k"] == 2
    assert set(record["fields"]) == {"hf_attn", "kconv_init", "kconv_layers", "kconv_width"}
