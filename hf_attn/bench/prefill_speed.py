"""Prefill of a whole model, dense and with a mechanism: end to end, and its attention calls alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_attn
from hf_attn.bench.decode import TOLERANCE, reference_path, switch
from hf_attn.bench.prefill import run_body
from hf_attn.bench.timing import Timing, paired_ratio
from hf_attn.mechanism import parse_config

# The check compares hidden states of the first tokens with the reference path, which forms dense masks.
CHECKED_TOKENS = 1024


@dataclass
class PrefillRow:
    """Seconds of interleaved prefills of one length, the attention calls' share of them, and what bounds the gain."""

    length: int
    name: str
    seconds: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    density: float = 1.0
    streaming: float = 0.0
    error: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self.seconds))

    @property
    def attention_timing(self) -> Timing:
        return Timing(tuple(self.attention))

    @property
    def attention_share(self) -> float:
        return self.attention_timing.median / self.timing.median

    def speedup(self, over: PrefillRow) -> float:
        return paired_ratio(over.timing, self.timing)

    def attention_speedup(self, over: PrefillRow) -> float:
        return paired_ratio(over.attention_timing, self.attention_timing)

    def ceiling(self, dense: PrefillRow) -> float:
        """Amdahl's bound end to end, were streaming heads free: 1 / (1 - attention share of dense * share of heads)."""
        return 1 / (1 - dense.attention_share * self.streaming)


@contextmanager
def timed_attention(name: str) -> Iterator[list[float]]:
    """Collect the seconds of every call of transformers' attention function `name` inside the `with` block."""
    original, found = ALL_ATTENTION_FUNCTIONS[name], []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = original(*args, **kwargs)
        found.append(time.perf_counter() - start)
        return out

    # An entry of this instance hides the registered one, and only that entry is taken off again.
    ALL_ATTENTION_FUNCTIONS[name] = timed
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def streaming_share(config: Any, layers: int) -> float:
    """Share of streaming heads over the layers of a model with `config` of lserve."""
    kinds = [config.retrieval(layer) for layer in range(layers)]
    return sum(0.0 if k is None else 1.0 if k == () else 1 - sum(k) / len(k) for k in kinds) / layers


def measure(
    model: Any,
    mechanism: str,
    options: dict[str, Any],
    ids: Tensor,
    lengths: list[int],
    *,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[PrefillRow]:
    """Two rows for each length, dense first; `repeats` interleaved prefills behind one that does not count.

    Args:
        model: a causal language model of transformers; it is left without the mechanism.
        ids: `[1, N]` with at least `max(lengths)` tokens.
        progress: called as `progress(done, total)` after each prefill, in tokens.
    """
    share = streaming_share(parse_config({**options, "mechanism": mechanism})[1], model.config.num_hidden_layers)
    variants = {"dense": None, mechanism: options}
    error = _error(model, mechanism, options, ids[:, : min(CHECKED_TOKENS, max(lengths))])
    total, done = (repeats + 1) * len(variants) * sum(lengths), 0
    rows = []
    for length in lengths:
        pair = [PrefillRow(length, name) for name in variants]
        pair[1].streaming, pair[1].error = share, error
        for turn in range(repeats + 1):
            for row in pair:
                switch(model, mechanism, variants[row.name])
                with timed_attention(model.config._attn_implementation) as calls:
                    seconds = run_body(model, ids[:, :length])[2]
                if turn:
                    row.seconds.append(seconds)
                    row.attention.append(sum(calls))
                if row is pair[1]:
                    row.density = hf_attn.stats(model)["totals"]["density"] or 1.0
                done += length
                if progress is not None:
                    progress(done, total)
        rows += pair
    hf_attn.remove(model)
    return rows


@torch.inference_mode()
def _error(model: Any, mechanism: str, options: dict[str, Any], ids: Tensor) -> float:
    """Largest difference of hidden states from the reference path, over their largest magnitude."""
    switch(model, mechanism, options)
    got = run_body(model, ids)[0]
    with reference_path():
        expected = run_body(model, ids)[0]
    return float((got - expected).abs().max() / expected.abs().max())
