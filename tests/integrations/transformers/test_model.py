"""apply, remove, stats and spec on loaded models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration as T5

import hf_attn
from tests.integrations.transformers.tiny import SIZES, assert_close, build, pair, tokens


def run(model, length: int = 9, **options):
    with torch.no_grad():
        return model(tokens(1, length), **options).logits


def tiny_llava():
    sizes = {k: v for k, v in SIZES.items() if k != "eos_token_id"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config={"model_type": "llama", **sizes},
        vision_config={**vision, "intermediate_size": 16, "image_size": 8, "patch_size": 4},
        image_token_id=2,
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def test_apply_and_remove_restore_everything():
    model = build("llama")
    before, config = run(model), model.config.to_json_string()
    assert hf_attn.apply(model, "exact", block_size=8, layers={-1: None}) is model
    assert model.config._attn_implementation == "hf_attn_exact"
    assert model.config.hf_attn == {"mechanism": "exact", "block_size": 8, "layers": {"-1": None}}
    assert_close(run(model), before)
    assert hf_attn.remove(model) is model
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_json_string() == config
    assert torch.equal(run(model), before)
    assert hf_attn.stats(model) == {
        "mechanism": None,
        "options": {},
        "repairs": [],
        "layers": {},
        "totals": {
            "layers": 0,
            "calls": 0,
            "sparse_calls": 0,
            "dense_calls": 0,
            "dense_reasons": {},
            "density": None,
            "counts": {},
        },
    }


def test_applying_twice_then_removing_gives_the_first_state():
    model = build("llama", "eager")
    hf_attn.apply(model, "exact")
    hf_attn.apply(model, "streaming", window=4, block_size=2)
    assert hf_attn.stats(model)["mechanism"] == "streaming"
    hf_attn.remove(model)
    assert model.config._attn_implementation == "eager" and model.config.hf_attn is None


def test_remove_restores_the_mechanism_of_the_checkpoint(tmp_path):
    hf_attn.apply(build("llama"), "exact", required=True, block_size=2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = model.config.to_json_string()
    hf_attn.apply(model, "streaming")
    assert "hf_attn_streaming" not in model.config.to_json_string()
    hf_attn.remove(model)
    assert model.config._attn_implementation == "hf_attn_exact" and model.config.to_json_string() == text
    # Now nothing is recorded: the checkpoint's own mechanism goes too.
    hf_attn.remove(model)
    assert model.config._attn_implementation == "sdpa" and model.config.hf_attn is None
    assert hf_attn.remove(model) is model


def test_layers_stay_dense_and_are_counted():
    model = hf_attn.apply(build("llama", num_hidden_layers=4), "exact", layers={"-2:": None, 3: {"ratio": 0.1}})
    run(model)
    layers = hf_attn.stats(model)["layers"]
    assert [layers[i]["dense_calls"] for i in range(4)] == [0, 0, 1, 0]
    assert layers[2]["dense_reasons"] == {"layers option": 1} and layers[2]["paths"] == {"dense": 1}


def test_stats_count_calls_lengths_and_density():
    model = hf_attn.apply(build("llama"), "exact")
    run(model, 9)
    run(model, 5)
    found = hf_attn.stats(model)
    assert json.loads(json.dumps(found))["mechanism"] == "exact"
    assert found["options"] == {"layers": {}, "block_size": 4, "ratio": 0.5}
    layer = found["layers"][1]
    assert layer["calls"] == layer["sparse_calls"] == 2 and layer["paths"] == {"exact": 2}
    assert (layer["last_q_len"], layer["last_k_len"]) == (5, 5)
    # The mechanism reports half of the visible pairs as computed; [B=1, heads=4] causal 9 and 5.
    assert layer["visible_pairs"] == 4 * (45 + 15) and layer["density"] == 0.5
    assert found["totals"]["calls"] == 4 and found["totals"]["density"] == 0.5
    hf_attn.reset_stats(model)
    assert hf_attn.stats(model)["layers"] == {}


def test_stats_stay_out_of_state_dict_and_copies():
    model = hf_attn.apply(build("llama"), "exact")
    run(model)
    assert not any("stat" in key for key in model.state_dict())
    twin = copy.deepcopy(model)
    assert hf_attn.stats(twin)["layers"] == {} and twin.config.hf_attn == model.config.hf_attn
    run(twin)
    assert hf_attn.stats(twin)["totals"]["calls"] == hf_attn.stats(model)["totals"]["calls"] == 2


def test_reasons_that_name_lengths_stay_bounded():
    from hf_attn.integrations.transformers.stats import MAX_REASONS, LayerStats

    stats = LayerStats()
    for length in range(100):
        stats.record(reason=f"{length} keys are too few")
    assert len(stats.dense) == MAX_REASONS + 1 and sum(stats.dense.values()) == 100


def test_spec_carries_options():
    name = hf_attn.spec("exact", block_size=8, layers={0: None})
    assert name.startswith("hf_attn_exact@") and name == hf_attn.spec("exact", layers={0: None}, block_size=8)
    assert name != hf_attn.spec("exact", block_size=16)
    dense, ours = pair("llama")
    ours.set_attn_implementation(name)
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    assert_close(run(ours, attention_mask=mask), run(dense, attention_mask=mask), mask.bool())
    found = hf_attn.stats(ours)
    assert found["options"]["block_size"] == 8 and found["layers"][0]["dense_calls"] == 1
    with pytest.raises(ValueError, match="no option 'blocks'"):
        hf_attn.spec("exact", blocks=8)


def test_multimodal_model_gets_it_in_the_text_model_only():
    model = tiny_llava()
    before = model.config.to_json_string()
    hf_attn.apply(model, "exact")
    assert model.config.text_config._attn_implementation == "hf_attn_exact"
    assert model.config.vision_config._attn_implementation == "sdpa"
    run(model)
    assert hf_attn.stats(model)["totals"]["calls"] == 2
    with pytest.raises(ValueError, match="'audio' is not a sub-config of LlavaConfig"):
        hf_attn.apply(model, "exact", targets=["audio"])
    hf_attn.remove(model)
    assert model.config.to_json_string() == before and model.config.text_config._attn_implementation == "sdpa"


def bloom():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config)


REFUSED = {
    "mechanism": (lambda: build("llama"), "mobba", {}, "unknown mechanism 'mobba' (did you mean 'moba'?)"),
    "option": (lambda: build("llama"), "exact", {"blocksize": 3}, "no option 'blocksize' (did you mean 'block_size'?)"),
    "layer": (lambda: build("llama"), "exact", {"layers": {2: None}}, "names layer 2, but the model has 2 layers"),
    "Bloom": (bloom, "exact", {}, "BloomForCausalLM has attention code of its own and ignores attn_implementation"),
    "position bias": (
        lambda: T5(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "exact",
        {},
        "does not support an additive position bias (position_bias), got relative_attention_num_buckets",
    ),
    "softcap": (
        lambda: build("gemma2", "eager", attn_logit_softcapping=50.0),
        "exact",
        {},
        "does not support soft-capping of the scores (softcap), got attn_logit_softcapping=50.0",
    ),
    "target": (lambda: build("llama"), "exact", {"targets": ["text_config"]}, "is not a sub-config of LlamaConfig"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_apply_refuses_and_changes_nothing(case):
    make, name, options, message = REFUSED[case]
    model = make()
    before = model.config.to_json_string(), model.config._attn_implementation
    with pytest.raises(ValueError) as caught:
        hf_attn.apply(model, name, **options)
    assert message in str(caught.value)
    assert (model.config.to_json_string(), model.config._attn_implementation) == before


def test_other_targets_raise_type_error():
    with pytest.raises(
        TypeError,
        match="hf_attn.apply takes a transformers PreTrainedModel, a diffusers pipeline or a diffusers model, got",
    ):
        hf_attn.apply(torch.nn.Linear(2, 2), "moba")
    with pytest.raises(TypeError, match="before torch.compile"):
        hf_attn.stats(torch.compile(build("llama")))
