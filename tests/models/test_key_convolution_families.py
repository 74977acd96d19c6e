"""Models with a key convolution: caches, padding, packing, generation modes, training, compilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import hf_attn
from hf_attn.integrations.transformers.key_history import SPARE_ROWS, KeyHistory
from hf_attn.models.conversion import enable_checkpointing
from tests.integrations.transformers.tiny import assert_close, cache_argument, tokens
from tests.models.families import FAMILIES, family, host


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.detach().abs().max())))


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)


def fed(model, ids, chunks, cache, mask=None) -> torch.Tensor:
    """Logits of `ids` given in pieces of these sizes."""
    parts, start = [], 0
    for size in chunks:
        options = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        options |= cache_argument(model, cache)
        parts.append(model(ids[:, start : start + size], use_cache=True, **options).logits)
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_convolution_matters(model_type):
    model = family(model_type)
    ids = tokens(2, 21)
    with_it = model(ids).logits
    layers = [layer.self_attn for layer in model.model.layers if layer.self_attn.k_conv1d is not None]
    assert len(layers) == 2
    for attention in layers:
        attention.k_conv1d.weight.zero_()
    assert (model(ids).logits - with_it).abs().max() > 1e-2


def test_a_call_without_tokens():
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        family("moba_llama")(attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("moba", [True, False], ids=["moba", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_prefix_consistency(model_type, moba):
    """Chunks of 1, 7, B and B + 3, and token by token, equal one pass to 1e-5 (specification, item 5)."""
    model = family(model_type, moba)
    ids = tokens(2, 21)
    want = model(ids, use_cache=False).logits
    for chunks in ([1, 7, 4, 7, 2], [1] * 21, [7, 14], [20, 1]):
        got = fed(model, ids, chunks, DynamicCache(config=model.config))
        close(got, want)
    # A cache without a config grows layer by layer; the history still comes after the model's layers.
    close(fed(model, ids, [5, 16], DynamicCache()), want)
    static = StaticCache(config=model.config, max_cache_len=24)
    close(fed(model, ids, [9] + [1] * 12, static), want)


@pytest.mark.parametrize("moba", [True, False], ids=["moba", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_padding_equals_unpadded(model_type, moba):
    """Left and right padding, in one pass and in chunks that cut through it."""
    model = family(model_type, moba)
    ids = tokens(3, 16)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, :6] = mask[2, 11:] = 0
    want = [model(ids[:1]).logits, model(ids[1:2, 6:]).logits, model(ids[2:, :11]).logits]
    one_pass = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    in_chunks = fed(model, ids[:2], [5, 6, 5], DynamicCache(config=model.config), mask[:2])
    for got in (one_pass, in_chunks):
        assert got.isfinite().all()
        for row in range(len(got)):
            close(got[row, mask[row] == 1], want[row][0])


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_packed_equals_separate(model_type, how):
    model = family(model_type)
    parts = [tokens(1, n, seed=n) for n in (9, 1, 14)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    options = {"position_ids": positions, "use_cache": False}
    if how == "cu_seq_lens":
        cu = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
        options |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    got = model(torch.cat(parts, 1), **options).logits
    close(got, torch.cat([model(part).logits for part in parts], 1))


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_generation_modes_give_the_same_tokens(model_type):
    model = family(model_type)
    ids = tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    want = generate(model, ids, attention_mask=mask)
    modes = (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        cache_argument(model, DynamicCache()),
    )
    for mode in modes:
        assert torch.equal(generate(model, ids, attention_mask=mask, **mode), want), mode
    alone = generate(model, ids[:1, 4:])
    assert torch.equal(alone[:, 7:], want[:1, 11:])
    assert torch.equal(generate(model, ids[:1, 4:], prompt_lookup_num_tokens=4), alone)
    beams = generate(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=3), beams)
    assert torch.equal(generate(model, ids, num_beams=3, cache_implementation="static", disable_compile=True), beams)


@torch.no_grad()
def test_assisted_decoding_with_a_converted_assistant():
    """Both caches are cropped: the target's by rejected candidates, the assistant's by all it ran ahead."""
    model, assistant = family("moba_llama"), family("moba_qwen3")
    assistant.load_state_dict(model.state_dict(), strict=False)
    ids = tokens(1, 11)
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


@torch.no_grad()
def test_crop_goes_back_and_says_when_it_cannot():
    model = family("moba_llama")
    ids = tokens(2, 60)
    want = model(ids).logits
    cache = DynamicCache(config=model.config)
    fed(model, ids[:, :50], [50], cache)
    cache.crop(-20)
    got = fed(model, ids[:, 30:], [5, 25], cache)
    close(got, want[:, 30:])
    with pytest.raises(ValueError, match=f"further than the {SPARE_ROWS} tokens"):
        cache.crop(-40)
    with pytest.raises(ValueError, match="start a new one"):
        fed(model, ids, [1], cache)
    recording = DynamicCache(config=model.config)
    fed(model, ids, [10], recording)
    recording.activate_past_recording()
    fed(model, ids[:, 10:], [25, 25], recording)
    recording.crop(-50)
    got = fed(model, ids[:, 10:], [50], recording)
    close(got, want[:, 10:])
    # Within the kept rows everything may go, back to an empty cache; and reset means empty as well.
    short = DynamicCache(config=model.config)
    fed(model, ids, [3], short)
    short.crop(-3)
    close(fed(model, ids, [60], short), want)
    short.reset()
    if short.get_seq_length() == 0:  # 5.17 fills what a cache holds with zeros, and keeps its length
        close(fed(model, ids, [60], short), want)


@torch.no_grad()
def test_batch_operations_reach_the_history():
    model = family("moba_llama")
    ids = tokens(2, 12)
    cache = DynamicCache(config=model.config)
    fed(model, ids, [6], cache)
    assert isinstance(cache.layers[-1], KeyHistory) and len(cache.layers) == model.config.num_hidden_layers + 1
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([1, 3]))
    got = fed(model, ids.flip(0)[:, 6:], [6], cache)
    close(got, model(ids).logits.flip(0)[:, 6:])


def test_a_cache_of_another_model_is_refused():
    model = family("moba_llama")
    cache = DynamicCache(config=family("moba_hybrid").config)
    with pytest.raises(ValueError, match="cache belongs to another model"):
        model(tokens(1, 4), **cache_argument(model, cache))
    filled = DynamicCache(config=model.config)
    host("llama")(tokens(1, 4), **cache_argument(model, filled))
    with pytest.raises(ValueError, match="the cache holds 4 tokens, but not the keys"):
        model(tokens(1, 1), **cache_argument(model, filled))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_gradients_and_checkpointing(model_type):
    """Every weight learns, and recomputation changes nothing."""
    ids = tokens(2, 17)
    found = []
    for checkpointing in (False, True):
        model = family(model_type).train()
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert any("k_conv1d" in name for name in found[0])
    for name, grad in found[0].items():
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], grad)


@pytest.mark.parametrize("model_type", ["moba_llama", "moba_hybrid"])
@torch.no_grad()
def test_bfloat16_generates(model_type):
    model = family(model_type).to(torch.bfloat16)
    ids = tokens(2, 11)
    want = family(model_type)(ids).logits
    got = model(ids).logits
    assert got.dtype == torch.bfloat16 and (got - want).abs().mean() < 0.05 * want.abs().mean()
    assert generate(model, ids).shape == (2, 20)


@pytest.mark.parametrize("use_cache", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_prefill_is_one_graph(use_cache):
    """A padded prompt, with the cache that the model makes itself inside the graph."""
    torch._dynamo.reset()
    model = family("moba_hybrid", num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    got = compiled(ids, attention_mask=mask, use_cache=use_cache).logits
    assert_close(got, model(ids, attention_mask=mask).logits, mask.bool())
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_static_decoding_is_one_graph_without_recompiling():
    torch._dynamo.reset()
    counters.clear()
    model = family("moba_llama")
    ids = tokens(2, 14)
    want = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    fed(model, ids, [8], cache)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for at in range(8, 14):
        position = torch.full((2, 1), at)
        step = compiled(ids[:, at : at + 1], position_ids=position, **cache_argument(model, cache)).logits
        close(step[:, 0], want[:, at])
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="static caches cannot be cropped in 5.17")
def test_static_history_keeps_its_address():
    model = family("moba_llama")
    cache = StaticCache(config=model.config, max_cache_len=40)
    ids = tokens(2, 12)
    with torch.no_grad():
        fed(model, ids, [6], cache)
        history = cache.layers[-1]
        address = history.read(0, torch.zeros(2, 2, 1, 8)).data_ptr()
        fed(model, ids[:, 6:], [1, 5], cache)
        cache.crop(-6)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = fed(model, ids.flip(0)[:, 6:], [6], cache)
    assert history.read(0, torch.zeros(2, 2, 1, 8)).data_ptr() == address
    close(got, model(ids).logits.flip(0)[:, 6:])


def test_stats_and_doctor_see_the_mechanism(sparse_path):
    model = family("moba_hybrid")
    with torch.no_grad():
        model(tokens(1, 30))
    layers = hf_attn.stats(model)["layers"]
    assert [layer["sparse_calls"] for layer in layers.values()] == [0, 1, 0, 1]
    assert hf_attn.doctor(model).ok
