"""generate_batch gives every request the tokens that generate gives it alone, and refuses before it is enabled."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import hf_attn
from hf_attn.integrations.transformers import continuous
from tests.integrations.transformers.modes import EQUAL, MECHANISMS, SPARSE, equal, sparse
from tests.integrations.transformers.tiny import build, tokens

pytest.importorskip("psutil", reason="transformers sizes its paged cache on a CPU with psutil")

PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (23, 5, 17)]


@pytest.fixture
def enabled(monkeypatch):
    """Enabled for one test."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

    monkeypatch.setattr(Manager, "switch_to_cb_friendly_attn", Manager.switch_to_cb_friendly_attn)
    hf_attn.enable_continuous_batching()


def paged(batch_tokens: int = 64) -> ContinuousBatchingConfig:
    """A small paged cache; its page size has two names."""
    known = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in known else "block_size"
    return ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=batch_tokens, **{page: 32})


def batched(model, batch_tokens: int = 64) -> list[list[int]]:
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    config = paged(batch_tokens)
    done = model.generate_batch(
        PROMPTS, generation_config=options, continuous_batching_config=config, progress_bar=False
    )
    return [request.generated_tokens for request in done.values()]


def alone(model) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_it_equals_sdpa(name, model_type, enabled, sparse_path):
    """Also with layers that have a window of their own (Gemma 3), whose cache holds fewer keys."""
    dense, ours = equal(name, model_type)
    want = alone(dense)
    assert batched(ours) == want
    assert hf_attn.stats(ours)["totals"]["sparse_calls"] > 0


@pytest.mark.parametrize("decode", ["moba", "full", None], ids=["moba", "moba, full decode", "streaming"])
@pytest.mark.parametrize("batch_tokens", [64, 16], ids=["whole prompts", "prompts in parts"])
def test_sparse_requests_equal_generate(decode, batch_tokens, enabled, sparse_path):
    """Decode and prefill of different requests share one step; each is treated as it would be alone."""
    ours = sparse("streaming") if decode is None else sparse("moba", decode=decode)
    assert batched(ours, batch_tokens) == alone(ours)
    assert hf_attn.stats(ours)["totals"]["density"] < 0.8


def test_a_window_of_the_model(enabled):
    """Every layer stays dense with the model's own window, and says so."""
    dense = build("mistral", sliding_window=8)
    ours = hf_attn.apply(build("mistral", sliding_window=8), "moba", **SPARSE["moba"])
    assert batched(ours) == alone(dense)
    assert set(hf_attn.stats(ours)["totals"]["dense_reasons"]) == {"sliding window 8 of the model"}


def test_other_implementations_go_through_as_before(enabled):
    dense = build("llama")
    assert batched(dense) == alone(dense)
    hf_attn.enable_continuous_batching()
    assert batched(dense) == alone(dense)


def test_block_tables_are_refused(enabled):
    module = build("llama").model.layers[0].self_attn
    heads, ends = torch.zeros(1, 4, 3, 8), torch.tensor([0, 3])
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "block_table": torch.zeros(1)}
    with pytest.raises(ValueError, match="hf_attn_moba does not read block tables"):
        list(continuous.paged_sequences(module, "hf_attn_moba", heads, heads, heads, options))


def test_it_is_refused_before_it_is_enabled():
    """In a fresh process: transformers refuses the name, and the attention function would too."""
    code = """
import torch, hf_attn
from hf_attn.integrations.transformers import continuous
from tests.integrations.transformers.tiny import build
model = hf_attn.apply(build("llama"), "moba")
try:
    model.generate_batch([[5, 6, 7]], max_new_tokens=2)
except Exception as error:
    print(type(error).__name__, error)
heads = torch.zeros(1, 4, 3, 8)
try:
    list(continuous.paged_sequences(model, "hf_attn_moba", heads, heads, heads, {}))
except ValueError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hf_attn_moba" in told.splitlines()[0]
    assert "hf_attn_moba runs continuous batching only after hf_attn.enable_continuous_batching()" in told


def test_what_the_wrapper_relies_on():
    """The one method, and that its second argument is the model."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

    assert list(inspect.signature(Manager.switch_to_cb_friendly_attn).parameters)[:2] == ["self", "model"]
    assert EQUAL.keys() == SPARSE.keys()
