"""One row a mechanism setting: every row runs the whole matrix of tests/matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A mechanism with a small configuration.

    Args:
        id: readable test id.
        mechanism: its name.
        options: small options, so that short sequences are really sparse.
        dense_options: options under which it must equal dense attention.
        block_size: of the options, for the lengths around block borders.
        dense_decode: a single token behind a cache attends to everything, by definition of this setting.
        bad_options: options that must be refused, with the word the message must contain.
    """

    id: str
    mechanism: str
    options: dict[str, Any]
    dense_options: dict[str, Any]
    block_size: int
    dense_decode: bool = False
    bad_options: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)


MOBA_BAD = {
    "block size 0": ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
    "block size float": ({"block_size": 16.0}, "block_size must be an integer >= 1, got 16.0"),
    "block size bool": ({"block_size": True}, "block_size must be an integer >= 1, got True"),
    "top_k 0": ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
    "decode": ({"decode": "sparse"}, "decode must be one of 'full', 'moba', got 'sparse'"),
    "min_seq_len": ({"min_seq_len": -1}, "min_seq_len must be an integer >= 0, got -1"),
    "layers key": ({"layers": {"last": None}}, "layers key 'last'"),
    "layers value": ({"layers": {"0": 3}}, "layers['0'] must be a dict of options or None"),
    "layers option": ({"layers": {"0": {"top_k": 0}}}, "top_k must be an integer >= 1, got 0"),
    "unknown": ({"topk": 3}, "has no option 'topk' (did you mean 'top_k'?)"),
}

CASES = [
    Case(
        id="moba",
        mechanism="moba",
        options={"block_size": 16, "top_k": 3, "min_seq_len": 0},
        dense_options={"block_size": 16, "top_k": 1000, "min_seq_len": 0},
        block_size=16,
        dense_decode=True,
        bad_options=MOBA_BAD,
    ),
    Case(
        id="moba-decode",
        mechanism="moba",
        options={"block_size": 16, "top_k": 3, "decode": "moba", "min_seq_len": 0},
        dense_options={"block_size": 16, "top_k": 1000, "decode": "moba", "min_seq_len": 0},
        block_size=16,
    ),
    Case(
        id="moba-odd-block",
        mechanism="moba",
        options={"block_size": 7, "top_k": 4, "decode": "moba", "min_seq_len": 0},
        dense_options={"block_size": 1000, "top_k": 1, "decode": "moba", "min_seq_len": 0},
        block_size=7,
    ),
    Case(
        id="streaming",
        mechanism="streaming",
        options={"num_sinks": 4, "window": 24, "block_size": 16},
        dense_options={"num_sinks": 0, "window": 100_000, "block_size": 16},
        block_size=16,
        bad_options={
            "num_sinks": ({"num_sinks": -1}, "num_sinks must be an integer >= 0, got -1"),
            "window": ({"window": 0}, "window must be an integer >= 1, got 0"),
            "block size": ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
            "unknown": ({"sinks": 3}, "has no option 'sinks'"),
        },
    ),
]
