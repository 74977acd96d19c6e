"""bf16 autocast on a CPU: rotary queries in fp32 beside bf16 values, forward, backward and generation."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.transformers.modes import MECHANISMS, all_sparse, equal
from tests.integrations.transformers.tiny import tokens


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_training_step(name, padded, sparse_path):
    """Loss and gradients are as near to fp32 as SDPA's under autocast (twice its error)."""
    dense, ours = equal(name)
    ids, mask = tokens(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[0, : 5 if padded else 0] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def step(model, autocast: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    exact, allowed, got = step(dense, False), step(dense, True), step(ours, True)
    for key, want in exact.items():
        limit = 2 * (allowed[key] - want).abs().max() + 1e-3 * want.abs().max()
        assert (got[key] - want).abs().max() <= limit, key
    assert all_sparse(ours)


@pytest.mark.parametrize("name", MECHANISMS)
def test_generation(name, sparse_path):
    dense, ours = equal(name)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(1, 23, dtype=torch.long)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.generate(tokens(1, 23), **options), dense.generate(tokens(1, 23), **options))
