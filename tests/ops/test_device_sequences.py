"""Sequences found on the device are those found on the host."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hf_attn.ops.hfattn_sparse.device_sequences import check_alignment, device_sequences
from hf_attn.ops.hfattn_sparse.sequences import split_sequences


def interleaved(tokens: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens of every sequence in order, the sequences mixed at random (half of the time)."""
    if random.random() < 0.5:
        return tokens
    waiting: dict[int, list[int]] = {}
    for segment, position in tokens:
        waiting.setdefault(segment, []).append(position)
    mixed = []
    while waiting:
        segment = random.choice(list(waiting))
        mixed.append((segment, waiting[segment].pop(0)))
        if not waiting[segment]:
            del waiting[segment]
    return mixed


def random_row(q_len: int, k_len: int, causal: bool) -> Tensor:
    """One row `[2, q_len + k_len]`: sequences with queries at their end, empty ones, future keys, padding."""
    queries, keys = [], []
    for segment in random.sample(range(9), random.randint(1, 4)):
        length, start = random.randint(0, 8), random.randint(0, 5)
        asked = random.randint(0, length + 2)
        future = random.choice((0, 0, 3)) if causal else 0
        keys += [(segment, start + i) for i in range(length + future)]
        queries += [(segment, start + length - asked + i) for i in range(asked)]
    queries, keys = interleaved(queries)[:q_len], interleaved(keys)[:k_len]
    queries += [(-1, 0)] * (q_len - len(queries))
    keys = [(-1, 0)] * (k_len - len(keys)) + keys
    return torch.tensor(queries + keys, dtype=torch.int32).T


@pytest.mark.parametrize("seed", range(20))
def test_device_and_host_find_the_same_sequences(seed):
    random.seed(seed)
    compared = 0
    while compared < 40:
        batch, q_len, k_len, causal = random.randint(1, 3), random.randint(1, 20), random.randint(1, 24), seed % 3 > 0
        index = torch.stack([random_row(q_len, k_len, causal) for _ in range(batch)])
        try:
            expected = split_sequences(index, q_len, k_len, causal)
        except ValueError:
            with pytest.raises(ValueError, match="its last tokens"):
                check_alignment(index, q_len, k_len, causal)
            continue
        compared += 1
        found = device_sequences(index, q_len, k_len, causal)
        for row in range(batch):
            own = [s for s in expected if s.batch == slice(None) or s.row == row]
            tokens = [(torch.arange(q_len)[s.q].tolist(), torch.arange(k_len)[s.k].tolist()) for s in own]
            check_row(found, row, tokens)


def check_row(found, row: int, tokens: list[tuple[list[int], list[int]]]) -> None:
    tiles, got, before = found.query_tiles(3), [], 0
    for tile in range(int(tiles.count[row])):
        first, length, block_id, number, q_first, q_length, k_first, k_length = (int(t[row, tile]) for t in tiles[1:])
        assert (first, length) == (q_first + 3 * block_id, min(3, q_length - 3 * block_id))
        assert first == before, "tiles must follow each other"
        before = first + length
        if block_id == 0 and k_length:
            assert number == len(got), "ordinals must be those of the host"
            queries = found.q_rows[row, q_first : q_first + q_length].tolist()
            got.append((queries, found.k_rows[row, k_first : k_first + k_length].tolist()))
    assert got == tokens
    assert int(found.key_tiles(4).count[row]) == sum(-(-len(keys) // 4) for _, keys in tokens)


def test_nothing_depends_on_the_data():
    tiles = device_sequences(torch.empty(2, 2, 30, dtype=torch.int32, device="meta"), 10, 20, True).query_tiles(4)
    assert tiles.count.shape == (2,) and tiles.first.shape == (2, 10)
