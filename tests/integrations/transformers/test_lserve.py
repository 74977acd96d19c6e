"""LServe in transformers: every way of generating, with its own cache, the host's, and both alike."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

import hf_attn
from hf_attn import LServeCache
from hf_attn.integrations.transformers.cache import StoreLayer
from tests.integrations.transformers.test_generation_modes import modes
from tests.integrations.transformers.tiny import assert_close, build, cache_argument, tokens

# Small enough that 23 tokens and 30 new ones cross several pages, reuse chunks and both windows.
SPARSE: dict[str, Any] = {
    "page_size": 4,
    "logical_page_size": 2,
    "token_budget": 12,
    "reuse_interval": 3,
    "ctx_sink": 4,
    "ctx_local": 8,
    "dec_sink": 4,
    "dec_local": 8,
    "heads": [[1, 0]],
    "min_seq_len": 0,
}
EQUAL = {**SPARSE, "token_budget": 4096, "ctx_local": 4096, "dec_local": 4096}
RETRIEVAL = {**SPARSE, "heads": None}
IDS = torch.cat([tokens(1, 8, seed=1)] * 3, 1)[:, :23]


def sparse(model_type: str = "llama", **options: Any):
    return hf_attn.apply(build(model_type), "lserve", **{**SPARSE, **options})


def generate(model, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": 30, "attention_mask": mask, **options})


def decode_counts(model) -> dict[str, float]:
    return hf_attn.stats(model)["totals"]["counts"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_its_cache_is_made_and_used(model_type):
    heads = None if model_type == "gpt2" else SPARSE["heads"]
    model = sparse(model_type, heads=heads)
    out = generate(model, return_dict_in_generate=True)
    cache = out.cache if "cache" in out else out.past_key_values
    assert isinstance(cache, LServeCache) and all(isinstance(layer, StoreLayer) for layer in cache.layers)
    counts = decode_counts(model)
    assert counts["decode_steps"] == 2 * 29
    # 24 is due for being the first, then every length that 3 divides up to 52.
    assert counts["selector_runs"] == 2 * len({24, *range(24, 53, 3)})
    assert hf_attn.stats(model)["totals"]["density"] < 0.75
    assert not torch.equal(out.sequences, generate(build(model_type)))
    report = hf_attn.cache_report(cache)
    assert report["tokens"] == 52 and report["pages_read"] == counts["pages_read"] and report["bytes"]["streaming"] >= 0


@pytest.mark.parametrize(
    "options", [SPARSE, {**SPARSE, "group_select": "group_max"}, RETRIEVAL], ids=["mixed", "group_max", "retrieval"]
)
@pytest.mark.parametrize("other", ["dynamic", "static"])
def test_plain_caches_give_the_same_tokens(options, other):
    """Statistics from the keys, streaming by mask, and the same selections used as long."""
    model = hf_attn.apply(build("llama"), "lserve", **options)
    expected = generate(model)
    runs = decode_counts(model)["selector_runs"]
    hf_attn.reset_stats(model)
    if other == "static":
        got = generate(model, **cache_argument(model, StaticCache(config=model.config, max_cache_len=64)))
    else:
        got = generate(model, **cache_argument(model, DynamicCache(config=model.config)))
    assert torch.equal(got, expected)
    assert decode_counts(model)["selector_runs"] == runs


@torch.inference_mode()
def test_logits_of_plain_caches_are_the_same():
    """Row by row, with rows that are padded and beams that change places."""
    model = sparse()
    ids, mask = tokens(3, 20, seed=4), torch.ones(3, 20, dtype=torch.long)
    mask[1, :6], mask[2, :17] = 0, 0
    caches = [LServeCache(model.config), DynamicCache(config=model.config)]
    order = torch.tensor([2, 1, 1])
    for step in range(14):
        new = ids if step == 0 else tokens(3, 1, seed=step)
        if step:
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        outs = [model(new, attention_mask=mask, **cache_argument(model, cache)).logits for cache in caches]
        assert_close(outs[0], outs[1], where=mask[:, -new.shape[1] :].bool())
        if step == 6:
            mask = mask[order]
            for cache in caches:
                cache.reorder_cache(order)


@pytest.mark.parametrize("mode", list(modes()))
def test_budgets_that_hold_everything_equal_sdpa(mode):
    if mode == "quantized cache" and "fp8" not in inspect.getsource(QuantizedCache):
        pytest.skip("this transformers has only quantized caches that need further packages")
    ours = hf_attn.apply(build("llama"), "lserve", **EQUAL)
    assert torch.equal(generate(ours, **modes()[mode]), generate(build("llama"), **modes()[mode]))


@pytest.mark.parametrize("mode", ["chunked prefill", "static cache"])
def test_sparse_modes_equal_sparse_greedy(mode):
    """Modes that compute single tokens as plain greedy decoding does, also when it drops most of them."""
    model = sparse()
    assert torch.equal(generate(model, **modes()[mode]), generate(model))


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted", "early exit", "beam", "sampled"])
def test_other_modes_run_sparse(mode):
    """Verified candidates are several tokens, so retrieval heads read everything for them; crop must keep the rest."""
    model = sparse()
    own = generate(model, **modes()[mode])
    plain = generate(model, **modes()[mode], **cache_argument(model, DynamicCache(config=model.config)))
    # With equal windows in prompts and decoding, what is stored is what a mask would show.
    assert torch.equal(own, plain)


@pytest.mark.parametrize("options", [SPARSE, RETRIEVAL], ids=["mixed", "retrieval"])
def test_left_padded_rows_equal_single_ones(options):
    model = hf_attn.apply(build("llama"), "lserve", **options)
    ids, lengths = tokens(3, 23, seed=5), [23, 9, 16]
    mask = torch.stack([(torch.arange(23) >= 23 - n).long() for n in lengths])
    rows = generate(model, ids, attention_mask=mask)
    for row, n in enumerate(lengths):
        assert torch.equal(rows[row, 23:], generate(model, ids[row : row + 1, 23 - n :])[0, n:])


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 4, 37])
def test_chunked_prefill_equals_one_call(chunk):
    """Retrieval heads exactly; streaming heads while their window is held."""
    ids = tokens(1, 60, seed=6)
    model = sparse(ctx_local=16, dec_local=8)
    whole = model(ids, **cache_argument(model, LServeCache(model.config))).logits
    cache = LServeCache(model.config)
    # A chunk of one token is decoding, which selects: give it a budget that holds everything.
    if chunk == 1:
        model = hf_attn.apply(build("llama"), "lserve", **{**EQUAL, "heads": None})
        whole = model(ids, **cache_argument(model, LServeCache(model.config))).logits
        cache = LServeCache(model.config)
    parts = [model(part, **cache_argument(model, cache)).logits for part in ids.split(chunk, 1)]
    assert_close(torch.cat(parts, 1), whole)


def test_two_turns_and_reset():
    """The second turn of a chat goes on with the cache of the first, and a reset cache is a new one."""
    model = sparse()
    cache = LServeCache(model.config)
    first = generate(model, max_new_tokens=6, **cache_argument(model, cache))
    more = torch.cat([first, tokens(1, 5, seed=9)], 1)
    second = generate(model, more, max_new_tokens=8, **cache_argument(model, cache))
    plain = DynamicCache(config=model.config)
    generate(model, max_new_tokens=6, **cache_argument(model, plain))
    assert torch.equal(second, generate(model, more, max_new_tokens=8, **cache_argument(model, plain)))
    cache.reset()
    assert cache.get_seq_length() == 0 and hf_attn.cache_report(cache)["bytes"]["total"] == 0
    assert torch.equal(generate(model, max_new_tokens=6, **cache_argument(model, cache)), first)


@pytest.mark.parametrize("kv_quant", ["int8", "int4", "int8-per-tensor"])
def test_quantised_caches_generate(kv_quant):
    """Close to the unquantised logits with 8 bits; batches, beams and crops run."""
    model = sparse(kv_quant=kv_quant)
    exact = sparse()
    with torch.inference_mode():
        logits = []
        for each in (model, exact):
            cache = LServeCache(each.config)
            each(IDS, **cache_argument(each, cache))
            logits.append(each(tokens(1, 1), **cache_argument(each, cache)).logits)
    error = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    assert 0 < error < (0.3 if kv_quant == "int4" else 0.05), error
    ids, mask = tokens(2, 23, seed=5), torch.ones(2, 23, dtype=torch.long)
    mask[1, :9] = 0
    rows = generate(model, ids, attention_mask=mask, num_beams=2)
    assert rows.shape == (2, 53)
    assert generate(model, prompt_lookup_num_tokens=3).shape == (1, 53)


def test_a_checkpoint_makes_its_cache(tmp_path):
    model = sparse()
    expected = generate(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hf_attn == model.config.hf_attn
    out = generate(loaded, return_dict_in_generate=True)
    assert isinstance(out.cache if "cache" in out else out.past_key_values, LServeCache)
    assert torch.equal(out.sequences, expected)


def test_a_name_with_options_makes_its_cache():
    name = hf_attn.spec("lserve", **SPARSE)
    model = build("llama", name)
    assert torch.equal(generate(model), generate(sparse()))
    assert decode_counts(model)["selector_runs"] > 0


def test_removing_gives_the_host_its_cache_back():
    model = sparse()
    hf_attn.remove(model)
    out = generate(model, return_dict_in_generate=True)
    assert isinstance(out.cache if "cache" in out else out.past_key_values, DynamicCache)
    assert torch.equal(out.sequences, generate(build("llama")))


def test_dense_layers_and_windows_of_the_model_keep_the_hosts_layers():
    model = sparse(layers={0: None})
    cache = LServeCache(model.config)
    assert [isinstance(layer, StoreLayer) for layer in cache.layers] == [False, True]
    expected = generate(model, **cache_argument(model, DynamicCache(config=model.config)))
    assert torch.equal(generate(model), expected)
    gemma = sparse("gemma3_text")
    assert [isinstance(layer, StoreLayer) for layer in LServeCache(gemma.config).layers] == [False, True]
    expected = generate(gemma, **cache_argument(gemma, DynamicCache(config=gemma.config)))
    assert torch.equal(generate(gemma), expected)


def test_compiled_decoding_with_a_static_cache():
    """Inside a graph nothing is remembered, so every step selects: the tokens of reuse_interval=1."""
    model = sparse(reuse_interval=1)
    expected = generate(model)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = generate(model, **cache_argument(model, StaticCache(config=model.config, max_cache_len=64)))
    assert torch.equal(got, expected)
