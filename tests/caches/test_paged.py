"""Pages of keys and values: statistics, growth, crop, rows, bytes."""

from __future__ import annotations

import pytest
import torch

from hf_attn.caches.paged import PagedKV
from hf_attn.caches.quantization import KVFormat
from hf_attn.ops import page_scores, page_statistics

P, NL = 16, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def append(store: PagedKV, key: torch.Tensor, value: torch.Tensor, counts: list[int] | None = None) -> None:
    counts = [key.shape[2]] * key.shape[0] if counts is None else counts
    store.write(key, value, counts, None)
    store.advance(key, counts)


def filled(key: torch.Tensor, value: torch.Tensor, steps: list[int], name: str | None = None) -> PagedKV:
    store, start = PagedKV(P, NL, KVFormat(name)), 0
    for step in steps:
        append(store, key[:, :, start : start + step], value[:, :, start : start + step])
        start += step
    return store


STEPS = [[99], [1] * 99, [37, 1, 1, 40, 20], [3, 16, 16, 1, 63], [64, 35]]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incremental_statistics_equal_one_shot(steps, dtype):
    key, value = random(2, 3, 99, 8).to(dtype), random(2, 3, 99, 8, seed=1).to(dtype)
    store = filled(key, value, steps)
    expected, count = page_statistics(key, page_size=P, logical_page_size=NL)
    assert torch.equal(store.stats[:, :, : expected.shape[2]], expected)
    assert count.sum() == 99 and count[-1].tolist() == [3, 0, 0, 0]
    for stored, given in zip(store.tokens(99), (key, value), strict=True):
        assert torch.equal(stored, given)


def test_scores_bound_every_key():
    """On 1000 random pages the score of a page is at least q.k of each of its keys."""
    key, query = random(1, 1, 1000 * P, 32), random(1, 4, 32, seed=1)
    stats, _ = page_statistics(key, page_size=P, logical_page_size=NL)
    scores = page_scores(query, stats, logical=True)[0].flatten(1)
    products = (query[0] @ key[0, 0].T).unflatten(1, (-1, NL)).amax(-1)
    assert (scores >= products - 1e-5).all()


def test_unequal_rows_equal_single_ones():
    key, value = random(3, 2, 60, 8), random(3, 2, 60, 8, seed=1)
    store = PagedKV(P, NL, KVFormat())
    for counts in ([30, 5, 0], [1, 1, 1], [1, 0, 1], [10, 20, 3]):
        start = store.lengths or [0, 0, 0]
        width = max(counts)
        parts = [
            torch.stack([torch.cat([x[b, :, s : s + c], x.new_full((2, width - c, 8), 9.0)], 1)
                         for b, (s, c) in enumerate(zip(start, counts, strict=True))])
            for x in (key, value)
        ]  # fmt: skip
        append(store, *parts, counts)
    assert store.lengths == [42, 26, 5]
    for row, length in enumerate(store.lengths):
        one = slice(row, row + 1)
        alone = filled(key[one], value[one], [length])
        assert torch.equal(store.tokens(length)[0][one], key[one, :, :length])
        pages = -(-length // P)
        assert torch.equal(store.stats[one, :, :pages], alone.stats[:, :, :pages])


@pytest.mark.parametrize("remove", [1, 3, 7, 20, 98])
@pytest.mark.parametrize("name", [None, "int8", "int4"])
def test_crop_equals_never_appended(remove, name):
    """Also into a page whose tokens are quantised already; only its statistics then come from rounded keys."""
    key, value = random(2, 2, 99, 8), random(2, 2, 99, 8, seed=1)
    store, expected = filled(key, value, [90, 1, 8], name), filled(key, value, [99 - remove], name)
    store.crop([remove, remove])
    assert store.lengths == expected.lengths
    for got, want in zip(store.tokens(99 - remove), expected.tokens(99 - remove), strict=True):
        assert torch.equal(got, want)
    pages = -(-(99 - remove) // P)
    error = {None: 0.0, "int8": 0.02, "int4": 0.4}[name]
    for got, want in zip(store.stats[:, :, :pages].flatten(), expected.stats[:, :, :pages].flatten(), strict=True):
        assert got == want or abs(float(got) - float(want)) <= error
    rest = slice(99 - remove, 99)
    append(store, key[:, :, rest], value[:, :, rest])
    append(expected, key[:, :, rest], value[:, :, rest])
    assert torch.equal(store.tokens(99)[0], expected.tokens(99)[0])


@pytest.mark.parametrize("name", [None, "int4"])
def test_rows_move_with_everything(name):
    key, value = random(3, 2, 50, 8), random(3, 2, 50, 8, seed=1)
    store, order = filled(key, value, [40, 10], name), torch.tensor([2, 0, 0, 1])
    before = store.tokens(50)[0].clone()
    store.select_rows(order)
    assert torch.equal(store.tokens(50)[0], before[order]) and store.lengths == [50] * 4
    expected, _ = page_statistics(key[order], page_size=P, logical_page_size=NL)
    assert torch.equal(store.stats[:, :, :4], expected)


def test_decoding_copies_the_storage_rarely(monkeypatch):
    """Pages are allocated ahead: 2000 tokens after a prompt of 2000 allocate a handful of times."""
    store, allocations = PagedKV(P, NL, KVFormat()), []
    allocate = KVFormat.allocate
    monkeypatch.setattr(KVFormat, "allocate", lambda *a: allocations.append(1) or allocate(*a))
    key = random(1, 1, 2000, 8)
    append(store, key, key)
    for _ in range(2000):
        append(store, key[:, :, :1], key[:, :, :1])
    assert len(allocations) <= 2 * 10 and store.lengths == [4000]
    assert store.bytes()["allocated"] <= 1.13 * sum(v for k, v in store.bytes().items() if k != "allocated")


@pytest.mark.parametrize("name", [None, "int8", "int4", "int8-per-tensor"])
def test_bytes_are_those_of_the_formula(name):
    """Specification 2.9: 2 P D bits / 8 + 2 P 4 a page and head, and statistics of 4 G D."""
    dim, tokens, heads = 128, 8192, 2
    key = random(1, heads, tokens, dim).half()
    store = PagedKV(64, 16, KVFormat(name))
    scales = (torch.tensor(0.02),) * 2 if name == "int8-per-tensor" else None
    store.write(key, key, [tokens], scales)
    store.advance(key, [tokens])
    held = sum(v for k, v in store.bytes().items() if k != "allocated")
    bits = {None: 16, "int8": 8, "int4": 4, "int8-per-tensor": 8}[name]
    page = 2 * 64 * dim * bits / 8 + (2 * 64 * 4 if name in ("int8", "int4") else 0) + 4 * 4 * dim
    assert held == pytest.approx(page * heads * tokens / 64, rel=0.01)
    if name == "int4":
        assert held <= 0.36 * (2 * 2 * heads * tokens * dim)
