"""Sinks and the ring: what is held, what is forgotten, what can be taken back."""

from __future__ import annotations

import pytest
import torch

from hf_attn.caches.quantization import KVFormat
from hf_attn.caches.streaming import StreamingKV

P, SINK, LOCAL, KEEP = 4, 8, 12, 20


def make(name: str | None = None) -> StreamingKV:
    return StreamingKV(P, SINK, LOCAL, SINK, KEEP, KVFormat(name))


def tokens(start: int, count: int, rows: int = 1) -> torch.Tensor:
    """Keys whose first channel is their number (plus 1000 a row)."""
    number = torch.arange(start, start + count, dtype=torch.float32) + 1000 * torch.arange(rows)[:, None]
    return number[:, None, :, None].expand(rows, 2, count, 6).contiguous()


def append(store: StreamingKV, start: int, count: int, single: bool = False) -> None:
    key = tokens(start, count)
    position = torch.arange(start, start + count)[None]
    store.append(store.encode(key, -key, position, None), single=single)


def held(store: StreamingKV) -> set[int]:
    """Numbers held, after checking that every slot holds the token its number says."""
    position = store.held.position[0]
    keys, values = (pages.dense()[0, :, 0] for pages in store.held[:2])
    for slot, number in enumerate(position.tolist()):
        if number >= 0:
            assert (keys[:, slot] == number).all() and (values[:, slot] == -number).all()
    return {n for n in position.tolist() if n >= 0}


def window(length: int, local: int) -> set[int]:
    return {n for n in range(length) if n < SINK or n > length - 1 - local}


def test_prompt_keeps_the_larger_window():
    store = make()
    for start, count in ((0, 7), (7, 30), (37, 1), (38, 25)):
        append(store, start, count)
        assert held(store) == window(start + count, KEEP)


@pytest.mark.parametrize("prompt", [1, 3, 8, 11, 30, 61])
def test_ring_holds_the_decode_window_in_constant_slots(prompt):
    store = make()
    append(store, 0, prompt)
    size = None
    for length in range(prompt + 1, prompt + 60):
        append(store, length - 1, 1, single=True)
        have = held(store)
        assert window(length, LOCAL) <= have
        assert len(have) <= SINK + LOCAL + P and store.held.position.shape[1] == SINK + LOCAL + P
        # The paper's slot of a token: sink pages, then a ring of LOCAL / P + 1 pages.
        for number in have:
            page = number // P
            where = page if page < SINK // P else SINK // P + (page - SINK // P) % (LOCAL // P + 1)
            assert int(store.held.position[0, where * P + number % P]) == number
        size = size or store.bytes()
        assert store.bytes() == size


@pytest.mark.parametrize("count", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("ring", [False, True])
def test_the_newest_call_can_be_taken_back(count, ring):
    for remove in {1, count // 2, count}:
        store, expected = make(), make()
        for each in (store, expected):
            append(each, 0, 50)
            if ring:
                append(each, 50, 1, single=True)
        start = 50 + ring
        before = held(store)
        append(store, start, count, single=ring and count == 1)
        store.crop([remove], [start + count - remove])
        if count > remove:
            append(expected, start, count - remove)
        assert held(store) == held(expected)
        if count == remove:
            assert held(store) == before


def test_more_than_the_newest_call_needs_a_reset():
    store = make()
    append(store, 0, 50)
    append(store, 50, 1, single=True)
    before = held(store)
    with pytest.raises(ValueError, match="cannot crop 2 tokens"):
        store.crop([2], [49])
    assert held(store) == before
    short = make()
    append(short, 0, 9)
    append(short, 9, 1, single=True)
    short.crop([7], [3])  # nothing was forgotten yet
    assert held(short) == {0, 1, 2}


def test_unequal_rows_and_their_order():
    store = make()
    key = tokens(0, 30, rows=2)
    position = torch.stack([torch.arange(30), torch.where(torch.arange(30) < 5, torch.arange(30), -1)])
    store.append(store.encode(key, -key, position, None), single=False)
    numbers = [set(row[row >= 0].tolist()) for row in store.held.position]
    assert numbers == [window(30, KEEP), set(range(5))]
    store.select_rows(torch.tensor([1, 0, 1]))
    numbers = [set(row[row >= 0].tolist()) for row in store.held.position]
    assert numbers == [set(range(5)), window(30, KEEP), set(range(5))]
    for step in range(40):
        new = tokens(0, 1, rows=3)
        store.append(store.encode(new, new, torch.tensor([[5 + step], [30 + step], [5 + step]]), None), single=True)
    numbers = [set(row[row >= 0].tolist()) for row in store.held.position]
    assert window(45, LOCAL) <= numbers[0] == numbers[2] and window(70, LOCAL) <= numbers[1]


@pytest.mark.parametrize("name", ["int8", "int4", "int8-per-tensor"])
def test_quantised_tokens_go_the_same_way(name):
    store = make(name)
    scales = (torch.tensor(0.5),) * 2 if name == "int8-per-tensor" else None
    key = torch.randn(1, 2, 40, 6)
    store.append(store.encode(key[:, :, :30], key[:, :, :30], torch.arange(30)[None], scales), single=False)
    for n in range(30, 40):
        new = key[:, :, n : n + 1]
        store.append(store.encode(new, new, torch.tensor([[n]]), scales), single=True)
    dense = store.held.key.dense()[:, :, 0]
    expected = store.format.encode(key, None if scales is None else scales[0]).dense()[:, :, 0]
    for slot, number in enumerate(store.held.position[0].tolist()):
        if number >= 0:
            assert torch.equal(dense[:, :, slot], expected[:, :, number])
