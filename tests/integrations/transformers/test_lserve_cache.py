"""The cache itself: what it refuses, what it survives, what it reports, and the handle it hands over."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_attn
from hf_attn import LServeCache, LServeConfig
from hf_attn.integrations.transformers.cache import StoreLayer
from tests.integrations.transformers.test_continuous_batching import alone, batched, enabled  # noqa: F401
from tests.integrations.transformers.test_lserve import EQUAL, IDS, SPARSE, generate, sparse
from tests.integrations.transformers.tiny import assert_close, build, cache_argument, tokens


@torch.inference_mode()
def step(model, cache, ids: torch.Tensor, **options) -> torch.Tensor:
    return model(ids, **cache_argument(model, cache), **options).logits


def filled(model, length: int = 30, rows: int = 1, **options) -> LServeCache:
    """A cache that is past its prompt."""
    cache = LServeCache(model.config, **options)
    step(model, cache, tokens(rows, length - 1, seed=2))
    step(model, cache, tokens(rows, 1, seed=3))
    return cache


def test_wrong_layers_and_heads():
    cache = LServeCache(sparse().config)
    deep = hf_attn.apply(build("llama", num_hidden_layers=3), "lserve", **SPARSE)
    with pytest.raises(ValueError, match="made for 2 layers, but the model has 3"):
        generate(deep, **cache_argument(deep, cache))
    with pytest.raises(ValueError, match="made for 2 layers, but layer 2 asks for it"):
        step(deep, LServeCache(sparse().config), IDS)
    wide = hf_attn.apply(build("llama", num_key_value_heads=4), "lserve", **{**SPARSE, "heads": [[1, 0, 1, 0]]})
    with pytest.raises(ValueError, match="made for 2 KV heads, got keys with 4"):
        step(wide, LServeCache(sparse().config), IDS)
    retrieval = {**SPARSE, "heads": None}
    first = hf_attn.apply(build("llama"), "lserve", **retrieval)
    other = hf_attn.apply(build("llama", num_key_value_heads=4), "lserve", **retrieval)
    with pytest.raises(ValueError, match="holds 2 KV heads of size 8 .* got 4 of size 8 .* another model"):
        step(other, filled(first), tokens(1, 1))
    with pytest.raises(ValueError, match="heads has 3 rows, but the model has 2 layers"):
        sparse(heads=[[1, 0]] * 3)
    with pytest.raises(ValueError, match="gates has 3 KV heads a layer, but the model has 2"):
        sparse(heads=None, gates=[[0.1, 0.2, 0.3]] * 2)


def test_changed_batch_dtype_and_options_leave_the_cache_usable():
    model = sparse()
    cache, twin = filled(model), filled(model)
    with pytest.raises(ValueError, match="holds a batch of 1, got a batch of 2"):
        step(model, cache, tokens(2, 1))
    with pytest.raises(ValueError, match="holds torch.float32 on cpu, got torch.float64 on cpu"):
        step(sparse().double(), cache, tokens(1, 1))
    with pytest.raises(ValueError, match="made with page_size=4, but the model runs with 8"):
        step(sparse(page_size=8, dec_sink=8, token_budget=24), cache, tokens(1, 1))
    with pytest.raises(ValueError, match="the mask of earlier tokens must not change"):
        mask = torch.ones(1, 31, dtype=torch.long)
        mask[0, :3] = 0
        step(model, cache, tokens(1, 1), attention_mask=mask)
    assert cache.get_seq_length() == twin.get_seq_length() == 30
    assert_close(step(model, cache, tokens(1, 1, seed=7)), step(model, twin, tokens(1, 1, seed=7)))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("count", [1, 6])
def test_a_step_that_fails_half_way_is_taken_back(failing, count, monkeypatch):
    model = sparse()
    cache, twin = filled(model), filled(model)
    original = StoreLayer.open

    def broken(self, config, layer, device):
        if layer == failing:
            raise MemoryError("no memory")
        return original(self, config, layer, device)

    monkeypatch.setattr(StoreLayer, "open", broken)
    with pytest.raises(MemoryError):
        step(model, cache, tokens(1, count, seed=5))
    monkeypatch.undo()
    assert cache.get_seq_length() == 30
    for seed in (7, 8):
        assert_close(step(model, cache, tokens(1, 1, seed=seed)), step(model, twin, tokens(1, 1, seed=seed)))


@pytest.mark.parametrize("kv_quant", [None, "int8", "int4"])
def test_crop_into_a_page(kv_quant):
    """What was cropped is as if it had never been there, in pages that are quantised already, too.

    But selections are dropped with every call of several tokens, so here every step selects.
    """
    model = sparse(kv_quant=kv_quant, reuse_interval=1)
    cache, twin = filled(model), filled(model)
    step(model, cache, tokens(1, 7, seed=5))
    cache.crop(-7)
    assert cache.get_seq_length() == 30
    assert_close(step(model, cache, tokens(1, 1, seed=7)), step(model, twin, tokens(1, 1, seed=7)))
    with pytest.raises(ValueError, match="cannot crop 20 tokens: streaming heads keep 4 first and 8 recent"):
        cache.crop(-20)
    assert cache.get_seq_length() == 31
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_mixing_with_another_mechanism():
    """Full keys and values for whoever else runs, as long as nothing was dropped; then a clear error."""
    model = sparse()
    cache = LServeCache(model.config)
    step(model, cache, tokens(1, 10, seed=2))
    hf_attn.remove(model)
    plain = DynamicCache(config=model.config)
    hf_attn.apply(model, "lserve", **SPARSE)
    step(model, plain, tokens(1, 10, seed=2))
    hf_attn.apply(model, "moba", block_size=4, top_k=2, decode="moba", min_seq_len=0)
    assert_close(step(model, cache, tokens(1, 3, seed=3)), step(model, plain, tokens(1, 3, seed=3)))
    model = sparse()
    cache = filled(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="dropped tokens of its streaming heads"):
        step(model, cache, tokens(1, 1))
    assert cache.get_seq_length() == 30


def test_a_handle_nobody_reads_raises(monkeypatch):
    """A config that names the mechanism while another function runs must not shorten attention silently."""
    model = sparse()
    cache = LServeCache(model.config)
    layer = cache.layers[0]
    key = torch.randn(1, 2, 5, 8)
    handed, _ = layer.update(key, key)
    assert handed is not key and torch.equal(handed, key) and not hasattr(key, "_hf_attn_layer")
    with pytest.raises(RuntimeError, match="keys of the last step were never read"):
        layer.update(key, key)
    layer.update(key, key)  # said once; the cache itself is as it was
    assert layer.get_seq_length() == 0


def test_options_of_the_cache_alone():
    """The format is the cache's own; explicit options win over the model's config."""
    model = sparse()
    exact, small = filled(model, 300), filled(model, 300, kv_quant="int4")
    sizes = [hf_attn.cache_report(cache)["bytes"] for cache in (exact, small)]
    assert sizes[1]["data"] * 8 == sizes[0]["data"] and sizes[1]["scales"] > 0
    parts = {"data", "scales", "zeros", "statistics", "copies", "streaming", "dense layers"}
    assert set(sizes[0]) == {*parts, "total", "allocated"}
    assert LServeCache(build("llama").config, LServeConfig(**SPARSE)).options == LServeConfig(**SPARSE)
    with pytest.raises(TypeError, match="cache_report takes a cache of hf_attn"):
        hf_attn.cache_report(DynamicCache(config=model.config))


def test_streaming_heads_take_constant_memory():
    model = sparse(heads=[[0, 0]])
    cache = filled(model, 40)
    before = hf_attn.cache_report(cache)["bytes"]
    for seed in range(30):
        step(model, cache, tokens(1, 1, seed=seed))
    assert hf_attn.cache_report(cache)["bytes"] == before and before["data"] == 0
    assert hf_attn.cache_report(cache)["tokens"] == 70


def test_layers_move_and_come_back():
    """Offloading moves a layer away between its steps (to where it is already, on a machine without a GPU)."""
    model = sparse(kv_quant="int8")
    cache, twin = filled(model), filled(model)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_close(step(model, cache, tokens(1, 1, seed=7)), step(model, twin, tokens(1, 1, seed=7)))


def test_rows_are_repeated_and_selected():
    model = sparse()
    cache, twin = filled(model, rows=2), filled(model, rows=2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    new = tokens(2, 1, seed=7)
    assert_close(step(model, cache, new), step(model, twin, new.flip(0)).flip(0))


def test_gradients_behind_a_cache_are_refused_in_training():
    model = sparse().train()
    cache = LServeCache(model.config)
    model(IDS, **cache_argument(model, cache))
    with pytest.raises(ValueError, match="no gradients behind a cache"):
        model(tokens(1, 1), **cache_argument(model, cache))
    out = model(IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_models_without_causal_attention_are_refused():
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("bert", **sizes)
    model = AutoModel.from_config(config, attn_implementation="hf_attn_lserve").eval()
    with pytest.raises(ValueError, match="hf_attn_lserve needs causal attention"):
        model(tokens(1, 5))


@pytest.mark.parametrize("batch_tokens", [64, 16], ids=["whole prompts", "prompts in parts"])
def test_continuous_batching(batch_tokens, enabled):  # noqa: F811
    """Requests share steps but not selections: every one gets the tokens generate gives it alone."""
    pytest.importorskip("psutil")
    model = sparse()
    expected = alone(model)
    hf_attn.reset_stats(model)
    assert batched(model, batch_tokens) == expected
    assert hf_attn.stats(model)["totals"]["counts"]["selector_runs"] > 0


def test_every_layer_class_method_is_there():
    """What `CacheLayerMixin` asks for, whatever this version asks for."""
    assert not StoreLayer.__abstractmethods__
    model = sparse()
    assert len(LServeCache(model.config)) == 2 and LServeCache(model.config).is_croppable
    assert not LServeCache(model.config).is_compileable
    assert LServeCache(model.config).get_max_length() == -1
    assert hf_attn.apply(build("llama"), "lserve", **EQUAL).config.hf_attn["mechanism"] == "lserve"
