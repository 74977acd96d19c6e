"""The signal-to-noise model: its formula against simulation, and the table it gives."""

from __future__ import annotations

import math

import pytest
import torch

import hf_attn
from hf_attn.analysis.snr import failure_probability, required_snr, routing_snr


@pytest.mark.parametrize(
    ("dim", "block", "gap"), [(64, 512, 1.0), (64, 128, 1.0), (64, 64, 1.0), (64, 128, 2.5), (128, 128, 1.0)]
)
def test_failure_probability_matches_simulation(dim, block, gap):
    """Unit keys on the sphere; one key of the signal block is moved towards the query by the gap (moba.md 2.9)."""
    generator = torch.Generator().manual_seed(0)
    trials = 4000
    query = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)

    def block_scores() -> torch.Tensor:
        scores = []
        for _ in range(trials // 500):
            keys = torch.randn(500, block, dim, generator=generator)
            scores.append((torch.nn.functional.normalize(keys, dim=-1) @ query).mean(1))
        return torch.cat(scores)

    failed = (block_scores() > block_scores() + gap / block).float().mean()
    assert failed == pytest.approx(failure_probability(routing_snr(gap, dim, block)), abs=0.02)


def test_recommend():
    table = hf_attn.recommend(32768, 64, token_budget=1024, dmu_eff=1.0)
    assert [c.block_size for c in table.choices] == [32, 64, 128, 256, 512]
    assert table.best.block_size == 128 and table.best.top_k == 8
    need = [c.dmu_eff_min for c in table.choices]
    assert need == sorted(need) and need[1] == pytest.approx(need[0] * math.sqrt(2))
    assert "<-" in str(table) and len(str(table).splitlines()) == 6
    same = hf_attn.recommend(32768, 64, sparsity=1 - 1 / 32)
    assert same.best.top_k == 8 and same.best.snr is None
    assert required_snr(4, 8) == -math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"token_budget": 8, "sparsity": 0.5}, "exactly one"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"token_budget": 8}, "exceeds the budget of 8 tokens"),
    ],
)
def test_recommend_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        hf_attn.recommend(4096, 64, **options)
