"""Adapters of converted models: what lies beside them, which bases they take, and that nothing is lost silently."""

from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_attn
from hf_attn.integrations.peft import hooks
from hf_attn.models.adapters import FILE, WEIGHTS
from tests.budget import assert_as_good_as_eager
from tests.integrations.transformers.tiny import tokens
from tests.loopback_hub import run_python
from tests.models.families import HOSTS, MOBA, host

peft = pytest.importorskip("peft")

IDS = tokens(2, 19)


def adapted(source, modules_to_save=("k_conv1d",), **options):
    """A converted model with a random LoRA and random new weights."""
    base = hf_attn.convert(source, "moba", **{**MOBA, **options})
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=list(modules_to_save) or None, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_conv1d" in name and "original_module" not in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A plain base in a folder, an adapter of its conversion, and the logits of both together."""
    source = host("llama")
    source.save_pretrained(tmp_path / "plain")
    model = adapted(source)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path, model(IDS).logits


@pytest.mark.parametrize("how", ["plain model", "plain folder", "converted model", "converted folder"])
@torch.no_grad()
def test_every_right_base(saved, how):
    folder, want = saved
    base = folder / "plain"
    if how == "converted folder":
        hf_attn.convert(base, "moba", **MOBA).save_pretrained(folder / "converted")
        base = folder / "converted"
    elif how == "converted model":
        base = hf_attn.convert(base, "moba", **MOBA)
    elif how == "plain model":
        base = AutoModelForCausalLM.from_pretrained(base)
    model = hf_attn.load_adapter(base, folder / "adapter")
    assert isinstance(model, peft.PeftModel) and torch.equal(model(IDS).logits, want)
    assert type(model.get_base_model()).__name__ == "MobaLlamaForCausalLM"


def test_what_lies_beside_the_adapter(saved):
    folder, _ = saved
    about = json.loads((folder / "adapter" / FILE).read_text())
    assert about["conversion"]["name"] == "moba" and about["conversion"]["options"] == MOBA
    assert about["base"]["type"] == "llama" and len(about["base"]["fingerprint"]["values"]) == 12
    assert about["base"]["fingerprint"]["parameters"] == host("llama").num_parameters()
    assert about["trained"] == [f"model.layers.{i}.self_attn.k_conv1d" for i in range(2)]
    # All new weights are in the adapter itself.
    assert not (folder / "adapter" / WEIGHTS).exists()


@torch.no_grad()
def test_new_weights_the_adapter_does_not_train_are_saved_too(tmp_path):
    source = host("qwen3")
    source.save_pretrained(tmp_path / "plain")
    model = adapted(source, modules_to_save=())
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) == 2
    again = hf_attn.load_adapter(tmp_path / "plain", tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, want)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_merge_and_unload_of_every_family(model_type, dtype, tmp_path):
    """Merged, saved, loaded by the Auto class: the logits of base and adapter."""
    # Loaded in its dtype: model.to(dtype) would also round the rotary frequencies, which no checkpoint holds.
    host(model_type).save_pretrained(tmp_path / "plain")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype))
    # Dense: in bfloat16 the last bit of a score may choose another block.
    model.set_attn_implementation("sdpa")
    want, oracle = model(IDS).logits, copy.deepcopy(model).double()(IDS).logits
    merged = model.merge_and_unload()
    assert_as_good_as_eager(merged(IDS).logits, want, oracle)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert type(loaded).__name__.startswith("Moba") and loaded.dtype == dtype
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


class TestWrongBases:
    def refused(self, saved, base, message):
        with pytest.raises(ValueError, match=message):
            hf_attn.load_adapter(base, saved[0] / "adapter")

    def test_architecture(self, saved):
        self.refused(saved, host("mistral"), "a llama model; the MistralForCausalLM given is a mistral model")

    def test_size(self, saved):
        message = r"with [0-9,]+ parameters; the LlamaForCausalLM given has [0-9,]+, or other shapes"
        self.refused(saved, host("llama", num_hidden_layers=3), message)

    def test_options(self, saved):
        other = hf_attn.convert(host("llama"), "moba", kconv_width=5, **MOBA)
        self.refused(saved, other, "kconv_width: 3 in the adapter, 5 here")

    def test_conversion(self, saved, monkeypatch):
        other = hf_attn.convert(host("llama"), "moba", **MOBA)
        other.config.hf_attn_conversion["name"] = "moh"
        self.refused(saved, other, "converted to 'moba'; .* converted to 'moh'")

    def test_weights(self, saved):
        other = host("llama")
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        self.refused(saved, other, "with weights [0-9a-f]{12}; the LlamaForCausalLM given is of that shape but")

    def test_no_file(self, saved):
        (saved[0] / "adapter" / FILE).unlink()
        self.refused(saved, host("llama"), "has no hf_attn.json")

    def test_a_peft_model(self, saved):
        with pytest.raises(TypeError, match="takes the base, got a PeftModel"):
            hf_attn.load_adapter(adapted(host("llama")), saved[0] / "adapter")


@torch.no_grad()
def test_precisions(saved):
    """A bfloat16 copy of the base is the same base; float16 cannot be told, which is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hf_attn.load_adapter(host("llama").to(torch.bfloat16), saved[0] / "adapter")
    with pytest.warns(UserWarning, match="cannot be compared"):
        hf_attn.load_adapter(host("llama").to(torch.float16), saved[0] / "adapter")


def test_peft_alone_on_the_plain_base_raises(saved):
    with pytest.raises(ValueError, match="new weights would be lost; use hf_attn.load_adapter"):
        peft.PeftModel.from_pretrained(host("llama"), saved[0] / "adapter")
    with pytest.raises(ValueError, match="kconv_width: 3 in the adapter, 5 here"):
        peft.PeftModel.from_pretrained(
            hf_attn.convert(host("llama"), "moba", kconv_width=5, **MOBA), saved[0] / "adapter"
        )


@torch.no_grad()
def test_peft_alone_on_the_converted_base_works(saved):
    model = peft.PeftModel.from_pretrained(hf_attn.convert(host("llama"), "moba", **MOBA), saved[0] / "adapter")
    assert torch.equal(model(IDS).logits, saved[1])


def test_adapters_of_plain_models_are_left_alone(tmp_path):
    model = peft.get_peft_model(host("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    peft.PeftModel.from_pretrained(host("llama"), tmp_path)
    with pytest.raises(ValueError, match="is no converted model"):
        hf_attn.save_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="takes a PeftModel, got LlamaForCausalLM"):
        hf_attn.save_adapter(host("llama"), tmp_path)


@torch.no_grad()
def test_a_base_in_four_bits(tmp_path):
    """Quantised and converted while loading; saving leaves it as it was, loading gives it again, merging keeps it."""
    pytest.importorskip("bitsandbytes", reason="4-bit bases need the package bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    # bitsandbytes packs blocks of 64 weights on CPUs.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, **heads)).save_pretrained(tmp_path / "plain")
    load = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    model = adapted(tmp_path / "plain", load=load)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.mul_(0.2)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, want)
    with pytest.warns(UserWarning, match="quantised"):
        again = hf_attn.load_adapter(tmp_path / "plain", tmp_path / "adapter", load=load)
    unused = copy.deepcopy(again)
    assert torch.equal(again(IDS).logits, want)
    # The same adapter put by PEFT on the same quantised, converted base.
    other = hf_attn.convert(tmp_path / "plain", "moba", load=load, **MOBA)
    assert torch.equal(peft.PeftModel.from_pretrained(other, tmp_path / "adapter")(IDS).logits, want)
    # Merging rounds the sums to 4 bits again, as the base was rounded; whether the model was run before is all one.
    exact = hf_attn.load_adapter(tmp_path / "plain", tmp_path / "adapter")(IDS).logits
    merged, also = (x.merge_and_unload()(IDS).logits for x in (again, unused))
    rounding = (want - exact).square().mean().sqrt()
    assert (merged - want).square().mean().sqrt() < rounding
    assert (merged - also).square().mean().sqrt() < 0.1 * rounding


def test_hooks_can_be_taken_back():
    from hf_attn.models import adapters

    adapters.install()
    assert peft.PeftModel.save_pretrained.__module__ == "peft.peft_model"  # functools.wraps
    hooks.uninstall()
    try:
        assert not hasattr(peft.PeftModel.save_pretrained, "_hf_attn_original")
    finally:
        adapters.install()


def test_the_trainer_writes_the_file(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = adapted(host("llama"))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / FILE).is_file()
    trainer.save_model(str(tmp_path / "result"))
    assert (tmp_path / "result" / FILE).is_file()


def with_mechanism(source):
    """A plain Llama under MoBA with a random LoRA."""
    hf_attn.apply(source, "moba", block_size=4, top_k=2, min_tokens=0, layers={"-1": None})
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(source, config).eval()


@pytest.mark.parametrize("how", ["model", "folder", "model with the mechanism"])
@torch.no_grad()
def test_an_adapter_restores_its_mechanism(how, tmp_path):
    host("llama").save_pretrained(tmp_path / "plain")
    model = with_mechanism(host("llama"))
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    base = tmp_path / "plain" if how == "folder" else host("llama")
    if how == "model with the mechanism":
        hf_attn.apply(base, "moba", block_size=4, top_k=2, min_tokens=0, layers={"-1": None})
    again = hf_attn.load_adapter(base, tmp_path / "adapter").eval()
    assert again.get_base_model().config.hf_attn == model.get_base_model().config.hf_attn
    assert torch.equal(again(IDS).logits, want)
    with pytest.warns(UserWarning, match=r"was trained with \{'mechanism': 'moba'.*use hf_attn.load_adapter"):
        dense = peft.PeftModel.from_pretrained(host("llama"), tmp_path / "adapter").eval()
    assert (dense(IDS).logits - want).abs().max() > 1e-3


def test_wrong_bases_of_an_adapter_with_a_mechanism(tmp_path):
    with_mechanism(host("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which is a llama model; .* is a qwen2 model"):
        hf_attn.load_adapter(host("qwen2"), tmp_path)
    other = hf_attn.apply(host("llama"), "streaming", window=8)
    with pytest.raises(ValueError, match=r"uses \{'mechanism': 'streaming'.*hf_attn.remove"):
        hf_attn.load_adapter(other, tmp_path)
    changed = host("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match="Use the checkpoint the adapter was trained on"):
        hf_attn.load_adapter(changed, tmp_path)


PLAIN_PROCESS = """
import sys, warnings
import hf_attn
assert "peft" not in sys.modules
import importlib.util
assert importlib.util.find_spec("peft") is not None and "peft" not in sys.modules
import peft
from transformers import AutoModelForCausalLM
try:
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
except ValueError as error:
    assert "its new weights would be lost" in str(error), error
else:
    raise SystemExit("nothing was raised")
import os
os.remove({adapter!r} + "/hf_attn.json")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
assert any("PEFT dropped 2 weights" in str(w.message) and "k_conv1d" in str(w.message) for w in caught), caught
"""


def test_a_process_without_converted_models(saved):
    """`import hf_attn` is enough: PEFT on the plain base raises, and without the file it warns of what it dropped."""
    code = PLAIN_PROCESS.format(base=str(saved[0] / "plain"), adapter=str(saved[0] / "adapter"))
    run_python(code, dict(os.environ))
