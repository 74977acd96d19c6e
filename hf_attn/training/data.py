"""Small real and synthetic data for recipes that end in minutes: no download, the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BYTE_VOCABULARY = 256
IGNORED = -100


def reference_text(held_out_every: int = 10) -> tuple[str, str]:
    """The Python language reference (about 460 kB of English prose) as (training text, held-out text).

    Whole topics are held out, every `held_out_every`-th in alphabetical order, so no sentence is in both.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::held_out_every]
    train = [name for name in names if name not in set(held_out)]
    kept, aside = ("\n\n".join(topics[name].strip() for name in part) for part in (train, held_out))
    return kept, aside


def byte_ids(text: str) -> list[int]:
    """UTF-8 bytes as token ids: a vocabulary of 256 without a tokenizer."""
    return list(text.encode())


def blocks(ids: Sequence[int], length: int) -> list[dict[str, Tensor]]:
    """Consecutive rows of `length` tokens for a language model; a shorter rest is left out.

    Raises ValueError when there is not even one row.
    """
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"length={length} is longer than the text ({len(ids)} tokens)")
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def associative_recall(
    count: int, length: int, *, pairs: int, queries: int, vocabulary: int, seed: int
) -> list[dict[str, Tensor]]:
    """Rows that name `pairs` key-value pairs among filler and then ask for them: only the answers are labels.

    A row holds the pairs (a key token, then its value) at random places of its first part, filler between them; its
    second part asks `queries` times for one of the keys, each time followed by its value. Half of the `vocabulary` is
    keys, half values, token 0 is the filler; keys of a row are distinct. Guessing is right 2 / vocabulary of the time.

    Raises ValueError when the pairs do not fit.
    """
    half = (vocabulary - 1) // 2
    stated = length - 2 * queries
    if not 1 <= pairs <= half or stated < 2 * pairs:
        raise ValueError(
            f"{pairs} pairs and {queries} queries need length >= {2 * (pairs + queries)} and vocabulary > {2 * pairs}, "
            f"got {length} and {vocabulary}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        keys = 1 + torch.randperm(half, generator=generator)[:pairs]
        values = 1 + half + torch.randint(half, (pairs,), generator=generator)
        ids = torch.zeros(length, dtype=torch.long)
        places = 2 * torch.randperm(stated // 2, generator=generator)[:pairs]
        ids[places], ids[places + 1] = keys, values
        asked = torch.randint(pairs, (queries,), generator=generator)
        ids[stated::2], ids[stated + 1 :: 2] = keys[asked], values[asked]
        labels = torch.full_like(ids, IGNORED)
        labels[stated + 1 :: 2] = ids[stated + 1 :: 2]
        rows.append({"input_ids": ids, "labels": labels})
    return rows
