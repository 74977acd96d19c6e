"""Measures of rankings with one relevant document, a lexical baseline, and a test of differences."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rank_of(scores: Sequence[float], answer: int) -> int:
    """Place of document `answer` from 1, ties in the order of the documents."""
    own = scores[answer]
    return 1 + sum(score > own or (score == own and number < answer) for number, score in enumerate(scores))


def measures(ranks: Sequence[int]) -> dict[str, float]:
    """P@1, MRR@10 and nDCG@10 of queries whose one relevant document stands at these places (from 1).

    Raises ValueError without ranks.
    """
    if not ranks:
        raise ValueError("ranks is empty: there is nothing to measure")
    count = len(ranks)
    return {
        "P@1": sum(rank == 1 for rank in ranks) / count,
        "MRR@10": sum(1 / rank for rank in ranks if rank <= 10) / count,
        "nDCG@10": sum(gains(ranks)) / count,
    }


def gains(ranks: Sequence[int]) -> list[float]:
    """nDCG@10 of each query: 1 / log2(1 + rank), 0 beyond the tenth place."""
    return [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]


def bootstrap_p(better: Sequence[float], worse: Sequence[float], draws: int = 10000, seed: int = 0) -> float:
    """One-sided paired bootstrap: share of resampled query sets on which `better` is not above `worse`.

    Never 0: with no such draw 1 / (draws + 1).

    Raises ValueError unless both hold as many values, at least one.
    """
    if len(better) != len(worse) or not better:
        raise ValueError(f"paired values are needed, got {len(better)} and {len(worse)}")
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    draw = random.Random(seed)
    below = sum(sum(draw.choices(differences, k=len(differences))) <= 0 for _ in range(draws))
    return (below + 1) / (draws + 1)


def bm25(
    query: str, documents: Sequence[str], collection: Sequence[str], k1: float = 1.2, b: float = 0.75
) -> list[float]:
    """BM25 scores of the documents, inverse document frequencies and mean length taken from `collection`."""
    frequencies = Counter(word for text in collection for word in set(_WORD.findall(text.lower())))
    mean = sum(len(_WORD.findall(text.lower())) for text in collection) / len(collection)
    return [_bm25(_WORD.findall(query.lower()), text, frequencies, len(collection), mean, k1, b) for text in documents]


def _bm25(words: list[str], text: str, frequencies: Counter, size: int, mean: float, k1: float, b: float) -> float:
    found = Counter(_WORD.findall(text.lower()))
    norm = k1 * (1 - b + b * sum(found.values()) / mean)
    total = 0.0
    for word in words:
        inverse = math.log(1 + (size - frequencies[word] + 0.5) / (frequencies[word] + 0.5))
        total += inverse * found[word] * (k1 + 1) / (found[word] + norm)
    return total
