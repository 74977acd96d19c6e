"""`config.hf_attn` through saving, loading, overriding, copying, and without the package."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlavaConfig
from transformers.configuration_utils import PreTrainedConfig

import hf_attn
from hf_attn.integrations.transformers import config as config_property
from tests.integrations.transformers.tiny import SIZES, assert_close, build, tokens

OPTIONS = {"mechanism": "exact", "block_size": 8, "layers": {"0": None, "-1:": {"ratio": 0.25}}}


@pytest.fixture
def folder(tmp_path):
    """A saved dense model."""
    build("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def implementation(model) -> str:
    return model.config._attn_implementation


def test_string_and_options(folder):
    model = load(folder, attn_implementation="hf_attn_exact", hf_attn={"block_size": 8})
    assert implementation(model) == "hf_attn_exact"
    assert model.config.hf_attn == {"mechanism": "exact", "block_size": 8}
    assert hf_attn.stats(model)["options"] == {"layers": {}, "block_size": 8, "ratio": 0.5}


def test_options_alone(folder):
    model = load(folder, hf_attn=OPTIONS)
    assert implementation(model) == "hf_attn_exact" and model.config.hf_attn == OPTIONS


def test_string_alone_means_defaults(folder):
    model = load(folder, attn_implementation="hf_attn_exact")
    assert model.config.hf_attn is None
    assert hf_attn.stats(model)["options"]["block_size"] == 4


def test_auto_config(folder, tmp_path):
    load(folder, hf_attn=OPTIONS).save_pretrained(tmp_path / "sparse")
    assert AutoConfig.from_pretrained(tmp_path / "sparse").hf_attn == OPTIONS
    config = AutoConfig.from_pretrained(folder, hf_attn=OPTIONS)
    assert implementation(AutoModelForCausalLM.from_config(config)) == "hf_attn_exact"


def test_set_attn_implementation(folder):
    model = load(folder)
    model.set_attn_implementation("hf_attn_exact")
    with torch.no_grad():
        model(tokens(1, 5))
    assert hf_attn.stats(model)["totals"]["calls"] == 2
    with pytest.raises(ValueError, match="hf_attn_nothing"):
        model.set_attn_implementation("hf_attn_nothing")


@pytest.mark.parametrize("required", [False, True])
def test_round_trip_is_byte_stable(folder, tmp_path, required):
    options = {**OPTIONS, "ratio": 1e-3, **({"required": True} if required else {})}
    model = load(folder, hf_attn=options)
    texts = []
    for name in ("one", "two", "three"):
        model.save_pretrained(tmp_path / name)
        texts.append((tmp_path / name / "config.json").read_bytes())
        model = load(tmp_path / name)
        assert implementation(model) == "hf_attn_exact" and model.config.hf_attn == options
    assert texts[0] == texts[1] == texts[2]
    assert (json.loads(texts[0]).get("attn_implementation") == "hf_attn_exact") == required


def test_saved_model_gives_the_same_logits(folder, tmp_path):
    model = load(folder, hf_attn=OPTIONS)
    model.save_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        assert_close(load(tmp_path / "sparse")(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_a_config_without_the_dict_is_saved_as_ever(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert "hf_attn" not in (tmp_path / "config.json").read_text()


def test_user_argument_wins_over_the_checkpoint(folder, tmp_path):
    load(folder, hf_attn={**OPTIONS, "required": True}).save_pretrained(tmp_path / "sparse")
    assert implementation(load(tmp_path / "sparse", attn_implementation="sdpa")) == "sdpa"
    other = load(tmp_path / "sparse", attn_implementation="hf_attn_streaming")
    assert implementation(other) == "hf_attn_streaming"
    name, options = hf_attn.stats(other)["mechanism"], hf_attn.stats(other)["options"]
    assert name == "streaming" and options["layers"] == {}
    with torch.no_grad():
        other(tokens(1, 9))
    assert "defaults" in str(hf_attn.doctor(other))


def test_new_options_replace_those_of_the_checkpoint(folder, tmp_path):
    load(folder, hf_attn={**OPTIONS, "required": True}).save_pretrained(tmp_path / "sparse")
    model = load(tmp_path / "sparse", hf_attn={"block_size": 16})
    assert model.config.hf_attn == {"mechanism": "exact", "block_size": 16}
    assert "attn_implementation" not in json.loads(model.config.to_json_string())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies(folder, duplicate):
    config = load(folder, hf_attn=OPTIONS).config
    assert duplicate(config).hf_attn == OPTIONS and duplicate(config).hf_attn is not config.hf_attn


def test_removing_the_dict(folder):
    model = load(folder, hf_attn={**OPTIONS, "required": True})
    model.config.hf_attn = None
    assert model.config.hf_attn is None
    text = model.config.to_json_string()
    assert "hf_attn" not in text and "attn_implementation" not in text


def test_options_take_effect_at_the_next_call(folder):
    model = load(folder, hf_attn={"mechanism": "exact"})
    with torch.no_grad():
        model(tokens(1, 5))
        model.config.hf_attn["layers"] = {"1": None}
        model(tokens(1, 5))
        # Also when a nested part of the same dict changes in place.
        model.config.hf_attn["layers"]["0"] = None
        model(tokens(1, 5))
    layers = hf_attn.stats(model)["layers"]
    assert layers[0]["dense_reasons"] == {"layers option": 1} and layers[1]["dense_reasons"] == {"layers option": 2}


def test_integer_layer_keys_become_strings(folder):
    assert load(folder, hf_attn={"mechanism": "exact", "layers": {0: None}}).config.hf_attn["layers"] == {"0": None}


BAD = {
    "mechanism": ({"mechanism": "exakt"}, "unknown mechanism 'exakt' (did you mean 'exact'?)"),
    "option": ({"mechanism": "exact", "blok_size": 3}, "no option 'blok_size' (did you mean 'block_size'?)"),
    "value": ({"mechanism": "exact", "block_size": 0}, "block_size must be >= 1, got 0"),
    "layer": ({"mechanism": "exact", "layers": {"x": None}}, "layers key 'x'"),
    "no mechanism": ({"block_size": 3}, "add a 'mechanism' key"),
    "target": ({"mechanism": "exact", "targets": ["text_config"]}, "not a sub-config of LlamaConfig; targets: ''"),
    "targets": ({"mechanism": "exact", "targets": "text_config"}, "must be a list of sub-config names"),
    "required": ({"mechanism": "exact", "required": "yes"}, "must be true or false, got 'yes'"),
    "not JSON": ({"mechanism": "exact", "block_size": {1, 2}}, "must hold JSON values only"),
    "no dict": ("exact", "must be a dict of options or None, got 'exact'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_dicts_raise_and_change_nothing(folder, case):
    value, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        load(folder, hf_attn=value)
    assert message in str(caught.value)
    config = LlamaConfig(**SIZES, hf_attn=OPTIONS)
    if "mechanism" in value and isinstance(value, dict):
        with pytest.raises(ValueError):
            config.hf_attn = value
        assert config.hf_attn == OPTIONS


def llava(**options):
    sizes = {k: v for k, v in SIZES.items() if k != "eos_token_id"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlavaConfig(text_config={"model_type": "llama", **sizes}, vision_config=vision, **options)


@pytest.mark.parametrize("required", [False, True])
def test_multimodal_config_targets_its_text_model(tmp_path, required):
    options = {"mechanism": "exact", "block_size": 8, **({"required": True} if required else {})}
    config = llava(hf_attn=options)
    texts = []
    for name in ("one", "two", "three"):
        assert config.hf_attn == options
        assert config.text_config.hf_attn == {"mechanism": "exact", "block_size": 8}
        assert config.text_config._attn_implementation == "hf_attn_exact"
        assert config.vision_config._attn_implementation != "hf_attn_exact" and config.vision_config.hf_attn is None
        config.save_pretrained(tmp_path / name)
        texts.append((tmp_path / name / "config.json").read_bytes())
        config = AutoConfig.from_pretrained(tmp_path / name)
    assert texts[0] == texts[1] == texts[2]
    config.hf_attn = None
    assert config.text_config.hf_attn is None


def test_install_is_idempotent_and_refuses_strangers(monkeypatch):
    before = PreTrainedConfig.hf_attn
    config_property.install()
    assert PreTrainedConfig.hf_attn is before
    monkeypatch.setattr(PreTrainedConfig, "hf_attn", property(lambda self: None))
    with pytest.raises(RuntimeError, match="already has an attribute 'hf_attn'"):
        config_property.install()


WITHOUT_PACKAGE = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        print("LOADED", AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation)
    except ValueError as error:
        print("ValueError", error)
assert not any(name.split(".")[0] == "hf_attn" for name in sys.modules)
"""


def test_checkpoints_without_the_package(folder, tmp_path):
    """`required` fails with a message that carries the package's name; otherwise the checkpoint loads dense."""
    folders = []
    for required in (True, False):
        folders.append(str(tmp_path / f"required-{required}"))
        load(folder, hf_attn={"mechanism": "moba", "required": required}).save_pretrained(folders[-1])
    run = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    refused, loaded = [line for line in run.stdout.splitlines() if line.startswith(("ValueError", "LOADED"))]
    assert refused.startswith("ValueError") and "hf_attn_moba" in refused
    assert loaded == "LOADED sdpa"
