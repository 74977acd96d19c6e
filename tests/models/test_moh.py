"""Models with Mixture-of-Head attention: conversion, decoding, layouts, saving, training, bad input."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import hf_attn
from tests.models.families import host

HOSTS = ["llama", "qwen2", "qwen3", "mistral"]
HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = torch.arange(48).view(2, 24) * 7 % 60 + 1


def convert(base, **options):
    options = {"shared_heads": 2, "top_k": 2, "tokens": TOKENS, **options}
    return hf_attn.convert(base, "moh", **options).eval()


@torch.no_grad()
def logits(model, ids=TOKENS, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("router", ["query_norm", "learned"])
@pytest.mark.parametrize("model_type", HOSTS)
def test_all_heads_are_the_base(model_type, router):
    """Items 2 and 5: with every head the converted model is the base, with fewer it is not."""
    base = host(model_type, **HEADS)
    want = logits(base)
    whole = convert(base, top_k=4, router=router)
    assert type(whole).__name__ == f"MoH{base.__class__.__name__}"
    torch.testing.assert_close(logits(whole), want, rtol=0, atol=1e-5)
    assert whole.activated_heads == 1 and convert(base, router=router).activated_heads == pytest.approx(4 / 6)
    assert (logits(convert(base, router=router)) - want).abs().max() > 1e-2
    whole.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(whole), want, rtol=0, atol=1e-5)


def test_learned_router_with_zero_weights_is_dense():
    base = host("llama", **HEADS)
    soft = convert(base, top_k=4, router="learned", router_scaling="code")
    for name, weight in soft.named_parameters():
        if "router" in name:
            torch.nn.init.zeros_(weight)
    torch.testing.assert_close(logits(soft), logits(base), rtol=0, atol=1e-5)


def test_skipping_is_gating():
    """`hf_attn_moh` computes the chosen heads only; any other implementation computes all and gates them."""
    model = convert(host("llama", **HEADS), router="learned")
    got = logits(model)
    report = hf_attn.stats(model)
    assert report["layers"][0]["calls"] == 1
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_decoding_padding_and_packing(router, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    model = convert(host("qwen3", **HEADS), router=router)
    want = logits(model)
    cache = None
    for position in range(TOKENS.shape[1]):
        with torch.no_grad():
            out = model(TOKENS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], want[:, position], rtol=0, atol=1e-4)
    static = StaticCache(config=model.config, max_cache_len=32)
    for part in (slice(0, 23), slice(23, 24)):
        with torch.no_grad():
            out = model(TOKENS[:, part], past_key_values=static, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], want[:, -1], rtol=0, atol=1e-4)

    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    padded = logits(model, attention_mask=mask)
    torch.testing.assert_close(padded[0, 5:], logits(model, TOKENS[:1, 5:])[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[1], want[1], rtol=0, atol=1e-4)

    row, positions = TOKENS.reshape(1, -1), torch.arange(24).repeat(2)[None]
    packed = logits(model, row, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed.view(2, 24, -1), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_save_and_load(model_type, tmp_path):
    model = convert(host(model_type, **HEADS), router="learned")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config._attn_implementation == "hf_attn_moh"
    assert again.config.moh_shared_heads == model.config.moh_shared_heads
    assert torch.equal(logits(again), logits(model))
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(remote), logits(model))
    assert (tmp_path / "modeling_hf_attn.py").is_file()


def test_training_adds_the_load_balance_loss():
    model = convert(host("llama", **HEADS), router="learned").train()
    out = model(TOKENS, labels=TOKENS)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + 0.01 * out.aux_loss)
    out.loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.router.wg.weight.grad.abs().sum() > 0
    for load in model.head_load():
        assert sum(load) == pytest.approx(2)
    model.eval()
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, plain, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count_in_the_load_balance():
    model = convert(host("llama", **HEADS))
    mask = torch.ones_like(TOKENS)
    mask[0, 10:] = 0
    other = TOKENS.clone()
    other[0, 10:] = 3
    first, second = (model(ids, attention_mask=mask, labels=ids).aux_loss for ids in (TOKENS, other))
    torch.testing.assert_close(first, second)
    assert (first - model(TOKENS, labels=TOKENS).aux_loss).abs() > 1e-6


def test_both_straight_through_forms_leave_the_output():
    base = host("llama", **HEADS)
    want = None
    for ste in ("selected", "all"):
        model = convert(base, ste=ste).train()
        got = model(TOKENS).logits
        want = got if want is None else want
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_groups_are_chosen_whole():
    model = convert(host("llama", **HEADS), shared_heads=[], top_k=1, router_granularity="kv_group")
    logits(model)
    heads = model.model.layers[0].self_attn.routing.heads.unflatten(-1, (2, 3))
    assert torch.equal(heads.any(-1), heads.all(-1)) and (heads.sum((-1, -2)) == 3).all()


def test_the_mechanism_alone():
    """Without a conversion: the query-norm router on an unmodified model."""
    base = host("llama", **HEADS)
    want = logits(convert(base, shared_heads=[0, 3], top_k=2))
    hf_attn.apply(base, "moh", shared_heads=[0, 3], top_k=2)
    torch.testing.assert_close(logits(base), want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="normalises them; convert the model"):
        logits(hf_attn.apply(host("qwen3", **HEADS), "moh"))


BAD = {
    "top_k": ({"shared_heads": [0], "top_k": 6}, "moh_top_k must be an integer from 0 to the 5 routed heads"),
    "repeated": ({"shared_heads": [1, 1]}, "moh_shared_heads must not repeat a head"),
    "range": ({"shared_heads": [6]}, "moh_shared_heads must hold head indices from 0 to 5, got 6"),
    "one routed head": ({"shared_heads": [0, 1, 2, 3, 4], "top_k": 1}, "needs at least 2 routed heads, got 1"),
    "layers": ({"top_k": [1, 1, 1, 1, 1, 1, 1]}, "moh_top_k must have one entry for each of the"),
    "router": ({"router": "norm"}, "moh_router must be one of 'query_norm', 'learned', got 'norm'"),
    "groups": (
        {"shared_heads": [0], "router_granularity": "kv_group"},
        "moh_shared_heads must be whole KV groups of 3",
    ),
    "unknown": ({"ratio": 0.5}, "convert(..., 'moh') has no option 'ratio'"),
    "text": ({"tokens": None}, "pass tokens=<token ids"),
    "number": ({"shared_heads": 7}, "shared_heads must be a number from 0 to 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, message = BAD[name]
    with pytest.raises(ValueError) as error:
        convert(host("llama", **HEADS), **options)
    assert message in str(error.value)


def test_calibration_takes_the_heads_that_contribute():
    base = host("llama", **HEADS)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight[:, 8:16] *= 20
            layer.self_attn.o_proj.weight[:, 40:48] *= 20
    assert convert(base).config.moh_shared_heads == [[1, 5]] * base.config.num_hidden_layers


def test_published_llama_checkpoint_loads(tmp_path):
    """Plain Llama weights and default fields (item 6 of the fit in HF: Chat-UniVi/MoH-LLaMA3-8B): half shared."""
    base = host("llama", **{**HEADS, "num_attention_heads": 8})
    base.save_pretrained(tmp_path)
    config = AutoConfig.for_model("moh_llama", **{k: v for k, v in base.config.to_dict().items() if k != "model_type"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.activated_heads == 0.75


def test_calibration_by_the_models_own_tokenizer(tiny_model):
    model = hf_attn.convert(tiny_model, "moh", shared_heads=1, top_k=1)
    layers = model.config.num_hidden_layers
    assert [len(shared) for shared in model.config.moh_shared_heads] == [1] * layers
