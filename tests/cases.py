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
        size_option: the option that holds it.
        dense_decode: a single token behind a cache attends to everything, by definition of this setting.
        dense_chunks: several tokens behind a cache do so too.
        selects_by_block: all queries of a block share a selection that depends on each of them, so that the future
            changes nothing only from one query block to the next.
        pools: keys are read as means, so that no mask of (query, key) pairs says what is read.
        bad_options: options that must be refused, with the word the message must contain.
    """

    id: str
    mechanism: str
    options: dict[str, Any]
    dense_options: dict[str, Any]
    block_size: int
    size_option: str = "block_size"
    dense_decode: bool = False
    dense_chunks: bool = False
    selects_by_block: bool = False
    pools: bool = False
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

PSA = {"block_size": 16, "stride": 4, "text_length": 0, "min_tokens": 0}
PSA_BAD = {
    "block size": ({"block_size": 12}, "block_k must be a multiple of 8"),
    "block_k": ({"block_k": 20}, "block_k must be a multiple of 8 (keys are pooled by 2, 4 and 8), got 20"),
    "unsorted bounds": ({"bounds": (0.5, 0.4, 0.7, 0.8)}, "bounds must be four rising numbers in [0, 1]"),
    "large bound": ({"bounds": (0.5, 0.6, 0.7, 1.2)}, "bounds must be four rising numbers in [0, 1]"),
    "three bounds": ({"bounds": (0.5, 0.6, 0.7)}, "bounds must be four rising numbers in [0, 1]"),
    "mode": ({"mode": "topk"}, "mode must be one of 'threshold', 'quantile', 'energybound', got 'topk'"),
    "preset": ({"preset": "wan2.1-13b"}, "unknown preset 'wan2.1-13b' (did you mean 'wan2.1-"),
    "layer preset": ({"layers": {"0": {"preset": "wan2.1-14b"}}}, "must not hold 'preset'"),
    "similarity": ({"similarity": (0.7, 0.7, 1.1)}, "similarity must be three numbers in [-1, 1]"),
    "similarity word": ({"similarity": "on"}, "similarity must be one of 'auto', got 'on'"),
    "tail": ({"tail": "zero"}, "tail must be one of 'replicate', 'exact'"),
    "reorder": ({"reorder": "morton"}, "reorder must be one of 'hilbert', 'none'"),
    "estimator": ({"estimator": "max"}, "estimator must be one of 'softmax', 'rowmax'"),
    "density": ({"density": 0.0}, "density must be a number in (0, 1], got 0.0"),
    "min_full": ({"min_full": 1.5}, "min_full must be in [0, 1], got 1.5"),
    "unknown": ({"threshold": 0.5}, "has no option 'threshold'"),
}
LSERVE_STREAMING = {
    "static_sparsity": 1.0,
    "page_size": 8,
    "logical_page_size": 4,
    "token_budget": 24,
    "ctx_sink": 8,
    "ctx_local": 16,
    "dec_sink": 8,
    "dec_local": 16,
    "min_seq_len": 0,
}
LSERVE_BAD = {
    "logical page": ({"page_size": 64, "logical_page_size": 48}, "page_size must be a multiple of logical_page_size"),
    "budget": ({"token_budget": 1000}, "token_budget must be a multiple of page_size=64, got 1000"),
    "small budget": ({"token_budget": 128}, "token_budget must be at least three pages (192 tokens), got 128"),
    "dec_sink": ({"dec_sink": 100}, "dec_sink must be a multiple of page_size=64, got 100"),
    "dec_local": ({"dec_local": 100}, "dec_local must be a multiple of page_size=64, got 100"),
    "sparsity": ({"static_sparsity": 1.5}, "static_sparsity must lie in [0, 1], got 1.5"),
    "kv_quant": ({"kv_quant": "int3"}, "kv_quant must be one of None, 'int8', 'int4', 'int8-per-tensor', got 'int3'"),
    "group_select": ({"group_select": "mean"}, "group_select must be one of 'per_query_head', 'group_max', got 'mean'"),
    "heads": ({"heads": [[1, 2]]}, "heads must hold 0 or 1 in every place, got 2"),
    "ragged gates": ({"gates": [[1.0, 0.0], [1.0]]}, "gates must be a list of rows of equal length"),
    "unknown": ({"budget": 3}, "has no option 'budget'"),
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
    Case(
        id="psa",
        mechanism="psa",
        options=PSA,
        dense_options={**PSA, "bounds": (1.0, 1.0, 1.0, 1.0)},
        block_size=16,
        dense_decode=True,
        dense_chunks=True,
        selects_by_block=True,
        pools=True,
        bad_options=PSA_BAD,
    ),
    Case(
        id="psa-keep-or-skip",
        mechanism="psa",
        options={**PSA, "bounds": (0.6, 0.6, 0.6, 0.6), "similarity": None},
        dense_options={**PSA, "density": 1.0, "similarity": None},
        block_size=16,
        dense_decode=True,
        dense_chunks=True,
        selects_by_block=True,
    ),
    Case(
        id="lserve-streaming",
        mechanism="lserve",
        options=LSERVE_STREAMING,
        dense_options={**LSERVE_STREAMING, "ctx_local": 100_000, "dec_local": 80_000},
        block_size=8,
        size_option="page_size",
        bad_options=LSERVE_BAD,
    ),
    Case(
        id="moh",
        mechanism="moh",
        options={"shared_heads": [0], "top_k": 1},
        dense_options={"shared_heads": [0], "top_k": 5},  # of the six heads of that test
        block_size=16,
        size_option="top_k",
        bad_options={
            "top_k 0": ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
            "shared head": ({"shared_heads": [-1]}, "shared_heads must hold head indices >= 0, got -1"),
            "unknown": ({"heads": 3}, "has no option 'heads'"),
        },
    ),
]
