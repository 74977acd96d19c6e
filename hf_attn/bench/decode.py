"""Decoding over a long context with a whole model: the host's cache, a mechanism's cache run dense, and its formats.

All variants take turns: a round is a few steps of each, so that a machine that drifts slows all of them alike. The
tokens are given (a real text), so perplexity and time come from the same steps. A variant whose check fails has no
speed.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import hf_attn
from hf_attn.bench.prefill import run_body
from hf_attn.bench.timing import Timing, paired_ratio
from hf_attn.integrations.transformers.cache import CACHES, StoreLayer, cache_argument, make_cache
from hf_attn.mechanism import MechanismConfig, parse_config

HOST, OWN = "DynamicCache", "own cache, dense"
# Teacher-forced steps of every variant, at least.
MIN_STEPS = 64
# Largest difference of logits over their largest magnitude that a check lets pass. In fp32 the two orders of summation
# were seen to differ by 1e-6 behind SmolLM2's 30 layers at 4096 and 8192 tokens; a wide margin for other models.
TOLERANCE = 5e-4
# Above this spread of the dense rounds (interquartile range over median) the machine was not quiet.
NOISY = 0.15


@dataclass(frozen=True)
class Variant:
    """A line of the table. `options` of the mechanism, None for the model's own attention over `DynamicCache`; `exact`
    where every token is read, so that logits must be the dense ones."""

    name: str
    options: dict[str, Any] | None
    exact: bool = False


@dataclass
class Row:
    """What one variant did at one length. Seconds are of the steps that count."""

    length: int
    name: str
    rounds: list[float] = field(default_factory=list)
    steps: int = 0
    selecting: list[float] = field(default_factory=list)
    reusing: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    error: float = 0.0
    density: float = 1.0
    bytes_held: float = 0.0
    bytes_read: float = 0.0
    pages_read: float | None = None
    pages_held: float | None = None
    selector_runs: float = 0.0
    interval: int = 1

    @property
    def passed(self) -> bool:
        """Whether the check lets a speed be stated; NaN does not."""
        return self.error <= TOLERANCE

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self.rounds))

    @property
    def tokens_per_second(self) -> float:
        return self.steps / self.timing.median

    @property
    def selector_share(self) -> float | None:
        """What a step that selects costs more than one that does not, as a share of the mean step."""
        if not self.selector_runs or not self.selecting or not self.reusing:
            return None
        more = (median(self.selecting) - median(self.reusing)) / self.interval
        return more / (self.timing.median / self.steps)

    def speedup(self, over: Row) -> float:
        """Median over the rounds of the other row's seconds over this one's."""
        return paired_ratio(over.timing, self.timing)

    @property
    def noisy(self) -> bool:
        """For the dense row: whether its rounds differ so much that the machine was not quiet."""
        return self.timing.spread > NOISY

    def perplexity_ratio(self, over: Row) -> float:
        """Perplexity of the text of the steps, over the other row's."""
        return float((torch.tensor(self.losses).mean() - torch.tensor(over.losses).mean()).exp())


def variants(mechanism: str, options: dict[str, Any], group_max: bool = False) -> list[Variant]:
    """The lines of the table, `options` checked; the length from which the mechanism selects is fixed by them.

    Raises ValueError for mechanisms without a cache of their own, and for unknown options or values.
    """
    if mechanism not in CACHES:
        raise ValueError(
            f"--mechanism must have a cache of its own ({', '.join(CACHES)}), got {mechanism!r}; other mechanisms "
            "decode over the host's cache as they are"
        )
    config = parse_config({**options, "mechanism": mechanism})[1]
    # A check forces paths, which must not move the length from which pages are selected.
    options = {**options, "min_seq_len": config.dense_up_to, "kv_quant": None}
    everything = {"token_budget": config.page_size << 30, "static_sparsity": 0.0, "heads": None}
    found = [
        Variant(HOST, None, exact=True),
        Variant(OWN, {**options, **everything}, exact=True),
        Variant(mechanism, options),
        Variant(f"{mechanism} KV8", {**options, "kv_quant": "int8"}),
        Variant(f"{mechanism} KV4", {**options, "kv_quant": "int4"}),
    ]
    if group_max:
        found.append(Variant(f"{mechanism} group_max", {**options, "group_select": "group_max"}))
    return found


# -- the context -------------------------------------------------------------------------------------------------------


class Prompts:
    """Keys and values of the text before the steps, dense and with the mechanism's prompt attention.

    One pass over the longest prompt serves all lengths: attention is causal, so a shorter prompt's keys are its first
    ones. Models with other layers than plain full attention run one pass for each length.
    """

    def __init__(self, model: Any, mechanism: str, options: dict[str, Any], ids: Tensor) -> None:
        self.model, self.mechanism, self.options, self.ids = model, mechanism, options, ids
        self._held: dict[tuple[bool, int], Cache] = {}

    def get(self, dense: bool, count: int, longest: int) -> Cache:
        """The host's cache of the first `count` tokens or more, of a pass over at most `longest` tokens."""
        for size in {longest, count}:
            if (dense, size) in self._held:
                return self._held[dense, size]
        switch(self.model, self.mechanism, None if dense else self.options)
        cache = run_body(self.model, self.ids[:, :longest])[1]
        size = longest
        if any(type(layer) is not DynamicLayer for layer in cache.layers) and longest != count:
            cache, size = run_body(self.model, self.ids[:, :count])[1], count
        self._held[dense, size] = cache
        return cache


class RandomPrompts:
    """Random keys and values in place of a prompt, for layers with random weights: only speed means anything."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self._held: Cache | None = None

    def get(self, dense: bool, count: int, longest: int) -> Cache:
        """`DynamicCache` of `longest` tokens; the same for both."""
        if self._held is None or self._held.get_seq_length() < longest:
            generator = torch.Generator().manual_seed(self.seed)
            heads, dim = self.config.num_key_value_heads, self.config.head_dim
            self._held = DynamicCache(config=self.config)
            for layer in range(self.config.num_hidden_layers):
                pair = (torch.randn(1, heads, longest, dim, generator=generator) for _ in range(2))
                self._held.update(*pair, layer)
        return self._held


def filled(model: Any, own: bool, prompt: Cache, count: int) -> Cache:
    """A cache of the mechanism the model runs now, or of the host, that holds the first `count` tokens of `prompt`.

    The mechanism's cache takes the keys as its prompt attention hands them over, unquantised.
    """
    cache = make_cache(model.config) if own else DynamicCache(config=model.config)
    for index, (layer, source) in enumerate(zip(cache.layers, prompt.layers, strict=True)):
        if isinstance(layer, StoreLayer):
            layer.store.append(source.keys[:, :, :count], source.values[:, :, :count], None)
        elif type(source) is DynamicLayer:
            layer.update(source.keys[:, :, :count], source.values[:, :, :count])
        else:
            cache.layers[index] = copy.deepcopy(source)
    return cache


# -- the steps ---------------------------------------------------------------------------------------------------------


def switch(model: Any, mechanism: str, options: dict[str, Any] | None) -> None:
    """The model's own attention, or the mechanism with these options."""
    if options is None:
        hf_attn.remove(model)
    else:
        hf_attn.apply(model, mechanism, **options)


class Run:
    """One variant at one length: its cache, where in the text it is, and what it did."""

    def __init__(self, model: Any, mechanism: str, variant: Variant, ids: Tensor, cache: Cache, row: Row) -> None:
        self.model, self.mechanism, self.variant, self.cache, self.row = model, mechanism, variant, cache, row
        self.ids, self.at = ids, cache.get_seq_length()
        self.argument = cache_argument(model)
        self.checked_logits: Tensor | None = None
        self.seen = {"computed": 0.0, "visible": 0.0, "steps": 0, "pages_read": 0.0, "selector_runs": 0.0}

    def forward(self, cache: Cache) -> tuple[Tensor, float]:
        """Logits fp32 `[vocab]` of the next token in the text and the seconds they took; moves nothing but `cache`."""
        token = self.ids[:, self.at : self.at + 1]
        start = time.perf_counter()
        logits = self.model(input_ids=token, use_cache=True, **{self.argument: cache}).logits
        return logits[0, -1].float(), time.perf_counter() - start

    def step(self) -> tuple[Tensor, float]:
        """The next token of the text; `forward` of this variant's cache."""
        logits, seconds = self.forward(self.cache)
        self.at += 1
        self.row.losses.append(float(cross_entropy(logits[None], self.ids[0, self.at : self.at + 1])))
        return logits, seconds

    def round(self, count: int) -> None:
        """`count` steps that count, behind one that does not: the first one after a change of options is slower."""
        switch(self.model, self.mechanism, self.variant.options)
        self.step()
        if self.variant.options is not None:
            hf_attn.reset_stats(self.model)
        seconds = []
        for _ in range(count):
            seconds.append(self.step()[1])
            due = self.at % self.row.interval == 0
            (self.row.selecting if due else self.row.reusing).append(seconds[-1])
        self.row.rounds.append(sum(seconds))
        self.row.steps = count
        self._count(count)

    def _count(self, steps: int) -> None:
        self.seen["steps"] += steps
        if self.variant.options is None:
            return
        for layer in hf_attn.stats(self.model)["layers"].values():
            self.seen["computed"] += layer["computed_pairs"]
            self.seen["visible"] += layer["visible_pairs"]
            for name in ("pages_read", "selector_runs"):
                self.seen[name] += layer["counts"].get(name, 0.0)

    def check(self, dense_logits: Tensor | None) -> None:
        """One more step, compared with the dense logits (exact variants) or the reference path on a copy of the cache.

        `dense_logits`: of the same step; None for the dense variant itself.
        """
        expected = dense_logits
        if not self.variant.exact:
            # Copies made in inference mode could not be written to by the cache, which outlives it.
            with torch.inference_mode(False), torch.no_grad():
                twin = copy.deepcopy(self.cache)
            with reference_path():
                expected = self.forward(twin)[0]
        self.checked_logits = self.step()[0]
        if expected is not None:
            self.row.error = float((self.checked_logits - expected).abs().max() / expected.abs().max())

    def report(self, config: MechanismConfig | None) -> None:
        """Bytes, pages and density of the steps that counted."""
        row, seen = self.row, self.seen
        if config is None:
            held = sum(t.numel() * t.element_size() for x in self.cache.layers for t in (x.keys, x.values))
            row.bytes_held = row.bytes_read = float(held)
            return
        report = hf_attn.cache_report(self.cache)
        sizes, stored = report["bytes"], [x.store for x in self.cache.layers if isinstance(x, StoreLayer)]
        retrieving = [store for store in stored if store.pages_held]
        pages = sum(sizes[name] for name in ("data", "scales", "zeros")) / max(report["pages_held"], 1)
        read = seen["pages_read"] / seen["steps"]
        row.selector_runs = seen["selector_runs"] / seen["steps"] / max(len(retrieving), 1)
        row.bytes_held = float(sizes["total"])
        row.bytes_read = read * pages + sizes["streaming"] + sizes["dense layers"]
        row.bytes_read += row.selector_runs * sizes["statistics"]
        row.density = seen["computed"] / seen["visible"] if seen["visible"] else 1.0
        row.pages_held = max((-(-max(store.lengths) // config.page_size) for store in retrieving), default=None)
        lists = sum(self._lists(store, config) for store in retrieving)
        row.pages_read = read / lists if lists else None

    def _lists(self, store: Any, config: MechanismConfig) -> int:
        """Lists of pages that a step of one layer reads: one a query head, or one a KV head."""
        text = self.model.config.get_text_config()
        kv_heads = store.paged.key.data.shape[1]
        longer = max(store.lengths) > config.dense_up_to
        per_query = longer and config.group_select == "per_query_head"
        return kv_heads * (text.num_attention_heads // text.num_key_value_heads if per_query else 1)


@contextmanager
def reference_path() -> Iterator[None]:
    """Every op by its reference inside the `with` block."""
    kept = os.environ.get("HF_ATTN_BACKEND")
    os.environ["HF_ATTN_BACKEND"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("HF_ATTN_BACKEND")
        if kept is not None:
            os.environ["HF_ATTN_BACKEND"] = kept


# -- the table ---------------------------------------------------------------------------------------------------------


def steps_needed(repeats: int, interval: int) -> tuple[int, int]:
    """Steps of a round, whole reuse intervals that make `MIN_STEPS` with all rounds, and steps of a variant in all."""
    per_round = -(-MIN_STEPS // (repeats * interval)) * interval
    return per_round, warm_up_steps(interval) + repeats * (1 + per_round)


@torch.inference_mode()
def measure(
    model: Any,
    mechanism: str,
    table: list[Variant],
    ids: Tensor,
    prompts: Prompts | RandomPrompts,
    lengths: list[int],
    *,
    repeats: int = 7,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Time every variant at every length: the steps end where the context has `length` tokens.

    Args:
        model: a causal language model of transformers; it is left without the mechanism.
        table: from `variants`.
        ids: `[1, N]`, a text of at least `max(lengths) + 1` tokens.
        prompts: where keys and values of the text before the steps come from.
        repeats: rounds, >= 1; warm-up apart.
        progress: called as `progress(done, total)` after every round of a variant.

    Raises ValueError for lengths that leave no room for the steps.
    """
    configs = [None if v.options is None else parse_config({**v.options, "mechanism": mechanism})[1] for v in table]
    interval = max((c.reuse_interval for c in configs if c is not None), default=1)
    per_round, total = steps_needed(repeats, interval)
    if min(lengths) <= total:
        raise ValueError(
            f"length {min(lengths)} has no room for {total} steps; use lengths beyond {total}, or fewer repeats"
        )
    rows: list[Row] = []
    done, rounds = 0, len(lengths) * len(table) * (repeats + 1)
    for length in lengths:
        runs = []
        for variant in table:
            prompt = prompts.get(variant.exact, length - total, max(lengths) - total)
            switch(model, mechanism, variant.options)
            cache = filled(model, variant.options is not None, prompt, length - total)
            row = Row(length, variant.name, interval=interval)
            runs.append(Run(model, mechanism, variant, ids, cache, row))
        for turn in range(repeats + 1):
            for run in runs:
                if turn:
                    run.round(per_round)
                else:
                    _warm_up(run, interval, runs[0])
                done += 1
                if progress is not None:
                    progress(done, rounds)
        for run, config in zip(runs, configs, strict=True):
            run.report(config)
            rows.append(run.row)
        del runs
    hf_attn.remove(model)
    return rows


def _warm_up(run: Run, interval: int, dense: Run) -> None:
    """Steps that do not count, the same number for all variants, and the check among the last of them."""
    switch(run.model, run.mechanism, run.variant.options)
    end = run.at + warm_up_steps(interval)
    # Check where a selection is used again: a last digit must not decide which pages are compared.
    while run.at < end - 2 or (interval > 1 and (run.at + 1) % interval == 0):
        run.step()
    run.check(None if run is dense else dense.checked_logits)
    while run.at < end:
        run.step()


def warm_up_steps(interval: int) -> int:
    """Steps before the rounds: every kind of step once, and the check."""
    return interval + 3
