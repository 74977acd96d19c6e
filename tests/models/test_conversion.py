"""hf_attn.convert: same logits, shared weights, round trips through folder and Hub, PEFT, and clear refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_attn
from hf_attn.models.conversion import enable_checkpointing, get_conversion
from tests.budget import assert_as_good_as_eager
from tests.integrations.transformers.tiny import tokens
from tests.models.families import HOSTS, MOBA, host

peft = pytest.importorskip("peft")


def untrained(model) -> bool:
    return all(not weight.any() for name, weight in model.named_parameters() if "k_conv1d" in name)


def train_a_little(model) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_conv1d" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_logits_are_those_of_the_host_and_weights_are_shared(model_type, width):
    """Zero-initialised convolutions leave logits unchanged (specification, item 11: to 1e-6; here exactly)."""
    source = host(model_type)
    ids = tokens(2, 19)
    dense = source(ids).logits
    model = hf_attn.convert(source, "moba", kconv_width=width, **MOBA)
    assert model.config.model_type == f"moba_{model_type}" and untrained(model)
    assert model.config._attn_implementation == "hf_attn_moba" and model.config.hf_attn["block_size"] == 4
    assert torch.equal(source(ids).logits, dense), "the given model changed"
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, dense)
    model.set_attn_implementation("hf_attn_moba")
    hf_attn.apply(source, "moba", **MOBA)
    assert torch.equal(model(ids).logits, source(ids).logits)
    mine, theirs = dict(model.named_parameters()), dict(source.named_parameters())
    assert all(mine[name] is weight for name, weight in theirs.items())
    assert sorted(set(mine) - set(theirs)) == [f"model.layers.{i}.self_attn.k_conv1d.weight" for i in range(2)]
    assert mine["model.layers.0.self_attn.k_conv1d.weight"].shape == (16, 1, width)


@torch.no_grad()
def test_what_belongs_to_the_model_comes_along():
    source = host("llama", tie_word_embeddings=True).to(torch.bfloat16)
    source.generation_config.temperature, source.generation_config.max_length = 0.5, 77
    enable_checkpointing(source)
    model = hf_attn.convert(source.train(), "moba", layers={"-1": None}, **MOBA)
    assert model.training and model.model.layers[0].gradient_checkpointing
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16} and model.config.dtype == torch.bfloat16
    assert model.generation_config.max_length == 77
    assert model.generation_config is not source.generation_config
    # A layer that stays dense gets no convolution.
    assert model.config.kconv_layers == [0] and model.model.layers[1].self_attn.k_conv1d is None


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_folder_round_trip(model_type, tmp_path):
    """Converted from a folder, saved, and loaded by plain Auto classes; a second save changes nothing."""
    source = host(model_type)
    source.save_pretrained(tmp_path / "host")
    ids = tokens(2, 19)
    model = hf_attn.convert(tmp_path / "host", "moba", load={"dtype": torch.float32}, **MOBA)
    assert untrained(model) and torch.equal(model(ids).logits, hf_attn.convert(source, "moba", **MOBA)(ids).logits)
    train_a_little(model)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(model) and loaded.config.hf_attn == model.config.hf_attn
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "modeling_hf_attn.py", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    base = AutoModel.from_pretrained(tmp_path / "first")
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_lora_trains_the_convolution_and_reloads(tmp_path):
    """LoRA with `modules_to_save` for the new weight: step, adapter reload, merge, and a plain load of the merge."""
    base = hf_attn.convert(host("qwen3"), "moba", **MOBA)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], modules_to_save=["k_conv1d"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    assert model.active_peft_config.base_model_name_or_path == str(tmp_path / "base")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = tokens(2, 19)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = [w for n, w in model.named_parameters() if "k_conv1d.modules_to_save" in n]
    assert len(trained) == 2 and all(w.abs().max() > 0 for w in trained)
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh_base, tmp_path / "adapter")
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(again(ids).logits, want)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert type(loaded).__name__ == "MobaQwen3ForCausalLM"
        torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_folder(tmp_path):
    oracle = hf_attn.apply(host("mistral").double(), "moba", **MOBA)
    source = host("mistral").to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    model = hf_attn.convert(str(tmp_path), "moba", load={"dtype": "auto"}, **MOBA)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    ids = tokens(1, 12)
    hf_attn.apply(source, "moba", **MOBA)
    assert_as_good_as_eager(model(ids).logits, source(ids).logits, oracle(ids).logits)


def test_auto_classes_know_every_family():
    from hf_attn.models import FAMILIES

    for family in FAMILIES:
        config = AutoConfig.for_model(family.model_type)
        assert type(config).__name__ == family.config
        for auto, name in family.classes():
            assert getattr(transformers, auto)._model_mapping[type(config)].__name__ == name


def test_import_loads_no_modelling_file():
    code = "import sys, hf_attn; print([m for m in sys.modules if '.modeling_moba' in m or 'modeling_llama' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


class TestRefusals:
    def test_names(self):
        with pytest.raises(ValueError, match="unknown conversion 'mobaa' .did you mean 'moba'"):
            hf_attn.convert(host("llama"), "mobaa")
        with pytest.raises(ValueError, match="hf_attn.apply"):
            get_conversion("streaming")

    @pytest.mark.parametrize("model_type", ["gpt2", "phi3", "deepseek_v3"])
    def test_model_types(self, model_type):
        extra = {"num_local_experts": 2} if model_type == "deepseek_v3" else {}
        source = host("gpt2") if model_type == "gpt2" else None
        config = AutoConfig.for_model(model_type, **extra)
        with pytest.raises(ValueError, match=f"no class for model type '{model_type}'; it has for llama, mistral"):
            get_conversion("moba").model_class(config)
        if source is not None:
            with pytest.raises(ValueError, match="no class for model type 'gpt2'"):
                hf_attn.convert(source, "moba")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kconv_width": 4}, "kconv_width must be odd, got 4"),
            ({"kconv_width": 0}, "use hf_attn.apply"),
            ({"kconv_width": 2.5}, "kconv_width must be an integer"),
            ({"top_k": 0}, "top_k must be an integer >= 1"),
            ({"kconf_width": 3}, "no option 'kconf_width'"),
            ({"layers": {"5": None}}, "names layer 5"),
            ({"layers": {":": None}}, "no layer of this model would run MoBA"),
            ({"load": {}}, "load= is for a repository"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            hf_attn.convert(host("llama"), "moba", **options)

    def test_a_model_of_sliding_windows(self):
        with pytest.raises(ValueError, match="sliding window"):
            hf_attn.convert(host("mistral", sliding_window=8), "moba")

    def test_peft_compiled_quantised_offloaded_and_other_objects(self):
        adapted = peft.get_peft_model(host("llama"), peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(TypeError, match="merge the adapter first"):
            hf_attn.convert(adapted, "moba")
        with pytest.raises(TypeError, match="before torch.compile"):
            hf_attn.convert(torch.compile(host("llama")), "moba")
        with pytest.raises(TypeError, match="got Linear"):
            hf_attn.convert(torch.nn.Linear(2, 2), "moba")
        injected = host("llama")
        injected._hf_peft_config_loaded = True  # what add_adapter sets
        with pytest.raises(ValueError, match="holds PEFT adapters"):
            hf_attn.convert(injected, "moba")
        quantised = host("llama")
        quantised.is_quantized = True
        with pytest.raises(ValueError, match="quantised"):
            hf_attn.convert(quantised, "moba")
        with pytest.raises(ValueError, match="offloaded"):
            hf_attn.convert(host("llama").to("meta"), "moba")
        with pytest.raises(ValueError, match="causal language model"):
            hf_attn.convert(host("llama").model, "moba")

    def test_a_converted_model_is_not_converted_again(self):
        with pytest.raises(ValueError, match="no class for model type 'moba_llama'"):
            hf_attn.convert(hf_attn.convert(host("llama"), "moba"), "moba")
