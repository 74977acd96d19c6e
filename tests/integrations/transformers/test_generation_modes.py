"""Every way of generating: tokens equal SDPA's when the mechanism chooses everything, plain greedy's when it drops."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import QuantizedCache, pipeline

import hf_attn
from tests.integrations.transformers.modes import MECHANISMS, all_sparse, equal, sparse
from tests.integrations.transformers.tiny import build, tokens

# A text that repeats, so that prompt lookup finds candidates.
IDS = torch.cat([tokens(1, 8, seed=1)] * 3, 1)[:, :23]


def modes() -> dict[str, dict[str, Any]]:
    """Arguments of generate by mode."""
    return {
        "sampled": {"do_sample": True},
        "beam": {"num_beams": 3},
        "quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": build("llama", seed=3, num_hidden_layers=1)},
        "early exit": {"assistant_early_exit": 1},
        "chunked prefill": {"prefill_chunk_size": 7},
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
    }


# Modes whose tokens must be those of plain greedy decoding by construction.
SAME_AS_GREEDY = ["prompt lookup", "assisted", "early exit", "chunked prefill", "static cache", "no cache"]


def generate(model, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": 10, "attention_mask": torch.ones_like(IDS), **options}
    return model.generate(IDS, **options)


@pytest.mark.parametrize("mode", list(modes()))
@pytest.mark.parametrize("name", MECHANISMS)
def test_it_equals_sdpa(name, mode, sparse_path):
    if mode == "quantized cache" and "fp8" not in inspect.getsource(QuantizedCache):
        pytest.skip("this transformers has only quantized caches that need further packages")
    dense, ours = equal(name)
    assert torch.equal(generate(ours, **modes()[mode]), generate(dense, **modes()[mode]))
    assert all_sparse(ours)


@pytest.mark.parametrize("mode", SAME_AS_GREEDY)
@pytest.mark.parametrize("name", MECHANISMS)
def test_sparse_modes_equal_sparse_greedy(name, mode, sparse_path):
    """Several candidate tokens behind a cache get what each of them would get alone."""
    ours = sparse(name)
    assert torch.equal(generate(ours, **modes()[mode]), generate(ours))
    assert all_sparse(ours) and not torch.equal(generate(ours), generate(build("llama")))


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted"])
def test_full_decode_is_for_single_tokens(mode, sparse_path):
    """With decode="full" a verified candidate is prefill: these modes agree with decode="moba", not with greedy."""
    full = sparse("moba", decode="full")
    got = generate(full, **modes()[mode])
    reasons = hf_attn.stats(full)["totals"]["dense_reasons"]
    assert hf_attn.stats(full)["totals"]["sparse_calls"] > 2  # more than the prompt's
    assert sum(reasons.values()) < 2 * 9  # fewer single tokens than greedy decoding has
    assert not torch.equal(got, generate(full))


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_assistant_with_a_mechanism(name, sparse_path):
    """The cheap use: a sparse draft changes the speed, never the tokens of the dense model."""
    dense = build("llama")
    assert torch.equal(generate(dense, assistant_model=sparse(name)), generate(dense))


@pytest.mark.parametrize("name", MECHANISMS)
def test_text_generation_pipeline(name, tiny_model, sparse_path):
    """By name and by checkpoint; batches are left-padded."""
    texts = ["attention " * 4, "a longer text about attention " * 2]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    dense = pipeline("text-generation", tiny_model)
    dense.tokenizer.pad_token = dense.tokenizer.eos_token or "!"
    chosen = {"attn_implementation": f"hf_attn_{name}", "hf_attn": equal(name)[1].config.hf_attn}
    ours = pipeline("text-generation", tiny_model, model_kwargs=chosen)
    ours.tokenizer.pad_token = dense.tokenizer.pad_token
    ours.tokenizer.padding_side = dense.tokenizer.padding_side = "left"
    assert ours(texts, batch_size=2, **options) == dense(texts, batch_size=2, **options)
    assert ours(texts[0], **options) == dense(texts[0], **options)
    assert all_sparse(ours.model)
