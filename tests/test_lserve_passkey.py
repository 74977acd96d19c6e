"""Passkeys behind LServe: what counts as found, and that every row of the table runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import hf_attn
from hf_attn.bench.lserve_passkey import FILLERS, found, variants
from hf_attn.bench.models import byte_tokenizer
from tests.integrations.transformers.tiny import build


@pytest.mark.parametrize("filler", sorted(FILLERS))
def test_the_first_number_counts(filler):
    """A model that reads the prompt finds every key; one that says another number first finds none."""
    tokenizer = byte_tokenizer()
    prompts = FILLERS[filler](tokenizer, 3, 700)
    assert all(650 < ids.shape[1] < 760 for ids, _ in prompts)

    def reader(before: str) -> SimpleNamespace:
        def generate(ids: torch.Tensor, **options: object) -> torch.Tensor:
            key = re.search(r"The pass key is (\d+)", tokenizer.decode(ids[0])).group(1)
            return torch.cat([ids, torch.tensor([tokenizer(f"{before} {key}. 99")["input_ids"]])], 1)

        return SimpleNamespace(generate=generate)

    assert found(reader(""), tokenizer, prompts) == [True] * 3
    assert found(reader(" 7 or"), tokenizer, prompts) == [False] * 3


def test_every_row_runs():
    model, tokenizer = build("llama", vocab_size=257), byte_tokenizer()
    gates = torch.rand(model.config.num_hidden_layers, model.config.num_key_value_heads).tolist()
    prompts = FILLERS["repeated"](tokenizer, 1, 500)
    rows = variants(gates, 256, 0.5, 64, 64)
    assert len(rows) == 3
    for options in rows.values():
        hf_attn.apply(model, "lserve", **options)
        assert found(model, tokenizer, prompts) in ([True], [False])
        calls = hf_attn.stats(model)["totals"]["calls"]
        hf_attn.remove(model)
        assert calls > 0
