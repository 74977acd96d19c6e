"""What the attention layers did: small counters beside the modules, outside any state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

MAX_REASONS = 16


@dataclass
class LayerStats:
    """Counters of one attention module since the last reset.

    A layer recomputed by gradient checkpointing counts twice; calls inside compiled or exported graphs do not count.
    """

    calls: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    computed: float | Tensor = 0.0
    visible: float | Tensor = 0.0
    counts: dict[str, float | Tensor] = field(default_factory=dict)
    q_len: int = 0
    k_len: int = 0

    def begin(self, q_len: int, k_len: int) -> None:
        """A call of `q_len` query and `k_len` key slots starts."""
        self.calls += 1
        self.q_len, self.k_len = q_len, k_len

    def record(
        self,
        *,
        path: str | None = None,
        computed: float | Tensor | None = None,
        visible: float | Tensor | None = None,
        reason: str | None = None,
        counts: dict[str, float | Tensor] | None = None,
    ) -> None:
        """What a mechanism (or the integration) reports about the running call; this is `call.layer.record`.

        Args:
            path: which code ran: "torch", "triton", "reference", "dense", ...
            computed, visible: numbers of (query, key) pairs computed, and visible under the call's own mask, summed
                over batch and heads in the same way for both. Python numbers, or 0-dim tensors (read only when the
                statistics are asked for, so a device is never synchronised here).
            reason: why the call ran dense; `None` for a sparse call.
            counts: further numbers of the mechanism's own (pages read, ...), summed over calls.
        """
        if path is not None:
            self.paths[path] += 1
        if reason is not None:
            # Reasons may name lengths, which change with every token of a long generation.
            known = reason in self.dense or len(self.dense) < MAX_REASONS
            self.dense[reason if known else "other reasons"] += 1
        if computed is not None and visible is not None:
            self.computed = self.computed + _detached(computed)
            self.visible = self.visible + _detached(visible)
        for name, number in (counts or {}).items():
            self.counts[name] = self.counts.get(name, 0) + _detached(number)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready counters; `density` is computed over visible pairs of the calls that reported them, or None."""
        dense = sum(self.dense.values())
        computed, visible = float(self.computed), float(self.visible)
        return {
            "calls": self.calls,
            "sparse_calls": self.calls - dense,
            "dense_calls": dense,
            "dense_reasons": dict(self.dense),
            "paths": dict(self.paths),
            "computed_pairs": computed,
            "visible_pairs": visible,
            "density": computed / visible if visible else None,
            "counts": {name: float(number) for name, number in self.counts.items()},
            "last_q_len": self.q_len,
            "last_k_len": self.k_len,
        }


_STORE: WeakKeyDictionary[nn.Module, LayerStats] = WeakKeyDictionary()


def stats_of(module: nn.Module) -> LayerStats:
    """The counters of an attention module; a deep copy of a model starts with fresh ones."""
    found = _STORE.get(module)
    if found is None:
        found = _STORE[module] = LayerStats()
    return found


def model_stats(model: nn.Module) -> dict[int | str, dict[str, Any]]:
    """Counters of every attention layer of `model` that was called, by layer number.

    Layers whose number another layer has already (cross-attention, a second tower), or that have none beside layers
    that do, go by their module's name. Where no layer has a number, they are counted in order.
    """
    called = [(name, module) for name, module in model.named_modules() if module in _STORE]
    numbers = [getattr(module, "layer_idx", None) for _, module in called]
    if all(number is None for number in numbers):
        numbers = list(range(len(called)))
    numbered: dict[int | str, dict[str, Any]] = {}
    named: dict[int | str, dict[str, Any]] = {}
    for (name, module), number in zip(called, numbers, strict=True):
        if number is None or int(number) in numbered:
            named[name] = _STORE[module].to_dict()
        else:
            numbered[int(number)] = _STORE[module].to_dict()
    return dict(sorted(numbered.items())) | named


def reset_model_stats(model: nn.Module) -> None:
    """Forget all counters of `model`."""
    for module in model.modules():
        _STORE.pop(module, None)


def totals(layers: dict[int | str, dict[str, Any]]) -> dict[str, Any]:
    """Sums over layers; `density` is again computed over visible pairs."""
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for layer in layers.values():
        reasons.update(layer["dense_reasons"])
        counts.update(layer["counts"])
    computed = sum(layer["computed_pairs"] for layer in layers.values())
    visible = sum(layer["visible_pairs"] for layer in layers.values())
    return {
        "layers": len(layers),
        "calls": sum(layer["calls"] for layer in layers.values()),
        "sparse_calls": sum(layer["sparse_calls"] for layer in layers.values()),
        "dense_calls": sum(layer["dense_calls"] for layer in layers.values()),
        "dense_reasons": dict(reasons),
        "density": computed / visible if visible else None,
        "counts": dict(counts),
    }


@contextmanager
def separate_stats() -> Iterator[None]:
    """Count into an empty store for a while, so that a probe leaves the user's counters alone."""
    global _STORE
    kept, _STORE = _STORE, WeakKeyDictionary()
    try:
        yield
    finally:
        _STORE = kept


def _detached(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
