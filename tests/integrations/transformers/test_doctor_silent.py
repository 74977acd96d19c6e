"""doctor on real examples of what fails without a word: it names the failure and says what to do."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface

import hf_attn
from tests.integrations.transformers.modes import EQUAL, SPARSE, sparse
from tests.integrations.transformers.tiny import SIZES, build


def test_mask_dropped_by_a_half_registration(monkeypatch):
    """A name with attention but without mask function: transformers then passes no mask at all."""
    model = hf_attn.apply(build("llama"), "exact")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "hf_attn_exact")
    report = hf_attn.doctor(model)
    assert not report.ok
    assert "'hf_attn_exact' has no mask function, so transformers passes it no mask: padding and packing" in str(report)
    assert hf_attn.doctor(hf_attn.apply(model, "exact")).ok


def test_mask_dropped_by_the_model():
    """A model whose code does not hand the mask on."""
    model = hf_attn.apply(build("llama"), "exact")
    inner = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: inner(*args, **kwargs)
    report = hf_attn.doctor(model)
    assert not report.ok
    assert "padding does not reach hf_attn_exact in layers [0, 1]: LlamaForCausalLM drops attention_mask" in str(report)


def test_packing_lost():
    """A note while evaluating, a problem for a model in training mode; gone once the cache is off."""
    model = sparse("moba")
    told = "packed rows lose their borders with use_cache=True"
    report = hf_attn.doctor(model)
    assert report.ok and told in str(report) and "keep_packing(trainer)" in str(report)
    assert any(told in problem for problem in hf_attn.doctor(model.train()).problems)
    model.config.use_cache = False
    assert hf_attn.doctor(model).ok and told not in str(hf_attn.doctor(model))


@pytest.fixture
def llava_config():
    text = LlamaConfig(**SIZES)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)


def test_vision_tower_hit_by_a_plain_string(llava_config):
    model = LlavaForConditionalGeneration._from_config(llava_config, attn_implementation="hf_attn_moba")
    report = hf_attn.doctor(model)
    assert not report.ok
    assert "hf_attn_moba is also set on vision_config: a plain attn_implementation string goes to every" in str(report)
    assert '{"text_config": "hf_attn_moba"}' in str(report)


def test_dict_and_apply_leave_the_tower_alone(llava_config):
    chosen = {"text_config": "hf_attn_moba"}
    for model in (
        LlavaForConditionalGeneration._from_config(llava_config, attn_implementation=chosen),
        hf_attn.apply(LlavaForConditionalGeneration(llava_config), "moba", **EQUAL["moba"]),
    ):
        assert "is also set on" not in str(hf_attn.doctor(model))


def test_adapter_on_a_wrong_base(tmp_path):
    """LoRA trained on a MoBA checkpoint, loaded onto the dense one: no error anywhere, another model."""
    peft = pytest.importorskip("peft")
    sparse("moba").save_pretrained(tmp_path / "sparse")
    build("llama").save_pretrained(tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    def load(base):
        return AutoModelForCausalLM.from_pretrained(tmp_path / base)

    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    peft.get_peft_model(load("sparse"), lora).save_pretrained(tmp_path / "adapter")
    wrong = peft.PeftModel.from_pretrained(load("dense"), tmp_path / "adapter")
    report = hf_attn.doctor(wrong)
    assert not report.ok
    assert "adapter 'default' was trained on" in str(report)
    assert "which uses 'moba' while this model uses None, but sits on" in str(report)
    right = peft.PeftModel.from_pretrained(load("sparse"), tmp_path / "adapter")
    report = hf_attn.doctor(right)
    assert report.ok and f"block_size={SPARSE['moba']['block_size']}" in str(report)


def test_extra_probes_leave_no_trace():
    model = sparse("streaming").train()
    model.model.layers[0].eval()
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    counted = hf_attn.stats(model)
    hf_attn.doctor(model)
    assert [module.training for module in model.modules()] == flags
    assert hf_attn.stats(model) == counted and torch.equal(torch.get_rng_state(), state)
