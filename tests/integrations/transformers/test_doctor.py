"""doctor finds what would otherwise fail silently, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTModel

import hf_attn
from tests.integrations.transformers.tiny import build, tokens


def test_a_healthy_model():
    model = hf_attn.apply(build("llama", num_hidden_layers=4), "exact", layers={"0": None})
    report = hf_attn.doctor(model, seq_len=(64, 4096))
    assert report.ok and report.problems == []
    text = str(report)
    assert text.startswith("hf_attn doctor: ok")
    assert "mechanism: exact (hf_attn_exact)" in text and "block_size=4" in text
    assert "called by 4 layers of 4" in text and "dense layers 0: layers option" in text
    assert "path of the ops: torch (HF_ATTN_BACKEND unset)" in text
    # 4096 tokens are beyond this model's 128 positions.
    assert "prefill of 64 tokens: density 25.0%" in text and "4096" not in text


def test_it_leaves_no_trace():
    model = hf_attn.apply(build("llama"), "exact").train()
    model.model.layers[0].eval()
    with torch.no_grad():
        model(tokens(1, 5))
    flags = [module.training for module in model.modules()]
    counted, state = hf_attn.stats(model), torch.get_rng_state()
    hf_attn.doctor(model)
    assert [module.training for module in model.modules()] == flags
    assert hf_attn.stats(model) == counted and torch.equal(torch.get_rng_state(), state)


def test_a_model_class_that_ignores_the_name():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hf_attn_exact")
    report = hf_attn.doctor(model)
    assert not report.ok
    assert "hf_attn_exact was never called: BloomForCausalLM ignores attn_implementation" in str(report)


def test_options_on_the_config_without_the_implementation():
    """What a config loaded before `import hf_attn` looks like."""
    model = build("llama")
    model.config.__dict__["hf_attn"] = {"mechanism": "exact"}
    report = hf_attn.doctor(model)
    assert not report.ok and "config.hf_attn names 'exact', but the model runs 'sdpa'" in str(report)


def test_no_mechanism():
    assert "no mechanism is set" in str(hf_attn.doctor(build("llama")))


def test_a_name_of_another_process():
    model = hf_attn.apply(build("llama"), "exact")
    model.config._attn_implementation_internal = "hf_attn_exact@0badc0de"
    report = hf_attn.doctor(model)
    assert not report.ok and "'hf_attn_exact@0badc0de' is not registered in this process" in str(report)


def test_all_layers_have_a_window():
    model = build("mistral", "hf_attn_exact", sliding_window=4)
    report = hf_attn.doctor(model)
    assert not report.ok
    assert "dense layers 0-1: sliding window 4 of the model" in str(report)
    assert "every layer stays dense, so exact does nothing; from_pretrained(..., sliding_window=None)" in str(report)


def test_what_training_would_refuse():
    model = hf_attn.apply(build("llama", attention_dropout=0.1), "exact")
    assert hf_attn.doctor(model).ok and "attention_dropout=0.1 is not supported" in str(hf_attn.doctor(model))
    assert not hf_attn.doctor(model.train()).ok


def test_soft_capping_is_a_problem():
    model = build("gemma2", "hf_attn_exact", attn_logit_softcapping=50.0)
    report = hf_attn.doctor(model)
    assert not report.ok and "soft-capping of the scores (softcap), got 50.0" in str(report)


def test_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "torrch")
    report = hf_attn.doctor(hf_attn.apply(build("llama"), "exact"))
    assert not report.ok and "HF_ATTN_BACKEND='torrch' is unknown" in str(report)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model = hf_attn.apply(build("llama"), "streaming", window=8, block_size=4, layers={"0": None})
    report = hf_attn.doctor(model, plot=tmp_path / "selection.png", input_ids=tokens(1, 40))
    assert report.ok and report.plotted_layer == 1
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"layer 0 ran no mechanism.*sparse layers: \[1\]"):
        hf_attn.doctor(model, plot=tmp_path / "x.png", layer=0)


def test_picture_of_a_mechanism_without_blocks(tmp_path):
    model = hf_attn.apply(build("llama"), "exact")
    with pytest.raises(ValueError, match="exact selects no blocks"):
        hf_attn.doctor(model, plot=tmp_path / "x.png")


def test_a_vision_model():
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = hf_attn.apply(ViTModel(config), "neighborhood", grid=[4, 4], prefix_tokens=1, kernel_size=3, min_tokens=0)
    report = hf_attn.doctor(model)
    assert report.ok, report.problems
    assert "called by 2 layers of 2" in str(report)
