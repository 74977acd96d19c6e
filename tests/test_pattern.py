"""BlockPattern: construction, set algebra, density, pictures, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from hf_attn.pattern import BlockPattern

SIZES = [
    {"block_q": 4, "block_k": 4, "q_len": 16, "k_len": 16},
    {"block_q": 5, "block_k": 3, "q_len": 17, "k_len": 23},
    {"block_q": 8, "block_k": 2, "q_len": 3, "k_len": 9},
    {"block_q": 128, "block_k": 1, "q_len": 20, "k_len": 20},
]


def random_mask(size, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-size["q_len"] // size["block_q"]), -(-size["k_len"] // size["block_k"]))
    return torch.rand(shape, generator=generator) < 0.4


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense_round_trip(size):
    mask = random_mask(size)
    pattern = BlockPattern.from_dense(mask, **size)
    assert torch.equal(pattern.to_dense(), mask)
    shuffled = pattern.indices.flip(-1)
    doubled = torch.cat([shuffled, pattern.indices], -1)
    assert BlockPattern.from_indices(doubled, **size) == pattern


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_set_algebra(size):
    a, b = random_mask(size, seed=1), random_mask(size, heads=1, seed=2)
    pa, pb = BlockPattern.from_dense(a, **size), BlockPattern.from_dense(b, **size)
    for got, expected in (
        (pa | pb, a | b),
        (pa & pb, a & b),
        (pa - pb, a & ~b),
        (pa ^ pb, a ^ b),
        (~pa, ~a),
    ):
        assert torch.equal(got.to_dense(), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_density_counts_pairs(size, causal):
    pattern = BlockPattern.from_dense(random_mask(size), **size)
    tokens = pattern.to_token_mask(causal=causal)
    everything = BlockPattern.full(**size).to_token_mask(causal=causal)
    assert pattern.pairs(causal=causal) == (int(tokens.sum()), int(everything.sum()) * 6)
    assert pattern.density(causal=causal) == pytest.approx(float(tokens.sum()) / float(everything.sum() * 6))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_builders_hold_exactly_the_blocks_with_a_visible_key(size):
    q, k = torch.arange(size["q_len"])[:, None] + size["k_len"] - size["q_len"], torch.arange(size["k_len"])
    rules = {
        "causal_blocks": (BlockPattern.causal_blocks(**size), k <= q),
        "window": (BlockPattern.window(5, **size), (k <= q) & (k > q - 5)),
        "prefix": (BlockPattern.prefix(3, **size), (k < 3) & (q > -99)),
        "full": (BlockPattern.full(**size), (k >= 0) & (q > -99)),
    }
    for name, (pattern, tokens) in rules.items():
        padded = torch.zeros(pattern.num_q_blocks * pattern.block_q, pattern.num_k_blocks * pattern.block_k)
        padded[: size["q_len"], : size["k_len"]] = tokens.float()
        blocks = padded.view(pattern.num_q_blocks, pattern.block_q, pattern.num_k_blocks, pattern.block_k)
        assert torch.equal(pattern.to_dense()[0, 0], blocks.amax((1, 3)) > 0), name


def test_empty_rows_and_no_keys():
    size = {"block_q": 4, "block_k": 4, "q_len": 8, "k_len": 8}
    nothing = BlockPattern.from_dense(torch.zeros(1, 1, 2, 2, dtype=torch.bool), **size)
    assert nothing.density() == 0 and (nothing.indices == -1).all()
    no_keys = BlockPattern.from_dense(torch.zeros(1, 1, 2, 0, dtype=torch.bool), block_q=4, block_k=4, q_len=8, k_len=0)
    assert no_keys.density() == 0


def test_plot_writes_a_picture(tmp_path):
    size = SIZES[1]
    BlockPattern.from_dense(random_mask(size), **size).plot(tmp_path / "many.png", causal=True, title="three heads")
    BlockPattern.causal_blocks(**size).plot(tmp_path / "one.png")
    for name in ("many.png", "one.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


BAD = {
    "block size": (
        lambda: BlockPattern.full(block_q=0, block_k=4, q_len=8, k_len=8),
        "block_q must be an integer >= 1",
    ),
    "mask shape": (
        lambda: BlockPattern.from_dense(torch.ones(1, 1, 3, 2).bool(), block_q=4, block_k=4, q_len=8, k_len=8),
        "mask must be bool [batch, heads, 2, 2]",
    ),
    "mask dtype": (
        lambda: BlockPattern.from_dense(torch.ones(1, 1, 2, 2), block_q=4, block_k=4, q_len=8, k_len=8),
        "mask must be bool",
    ),
    "index range": (
        lambda: BlockPattern.from_indices(torch.full((1, 1, 2, 1), 2), block_q=4, block_k=4, q_len=8, k_len=8),
        "indices must lie in -1 (unused) to 1, got 2 to 2",
    ),
    "geometry": (
        lambda: BlockPattern.full(**SIZES[0]) | BlockPattern.full(**SIZES[1]),
        "patterns combine only with the same",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
