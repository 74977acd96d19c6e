"""Both mechanisms in two settings: one that must equal SDPA though it runs the sparse path, one that really drops."""

from __future__ import annotations

from typing import Any

import hf_attn
from tests.integrations.transformers.tiny import build

# Everything is chosen, but by the sparse code (with HF_ATTN_BACKEND=torch nothing switches to dense).
EQUAL: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 4, "top_k": 1000, "decode": "moba", "min_seq_len": 0},
    "streaming": {"block_size": 4, "window": 4096, "num_sinks": 0},
}
SPARSE: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 4, "top_k": 2, "decode": "moba", "min_seq_len": 0},
    "streaming": {"block_size": 4, "window": 5, "num_sinks": 2},
}
MECHANISMS = list(EQUAL)


def sparse(name: str, model_type: str = "llama", **options: Any):
    """A tiny model whose mechanism drops most of 23 tokens."""
    return hf_attn.apply(build(model_type), name, **{**SPARSE[name], **options})


def equal(name: str, model_type: str = "llama", **options: Any):
    """The same weights twice: SDPA, and a mechanism that chooses everything."""
    dense, ours = build(model_type, **options), build(model_type, **options)
    return dense, hf_attn.apply(ours, name, **EQUAL[name])


def all_sparse(model) -> bool:
    """Whether every call so far ran the mechanism."""
    totals = hf_attn.stats(model)["totals"]
    return totals["calls"] == totals["sparse_calls"] > 0
