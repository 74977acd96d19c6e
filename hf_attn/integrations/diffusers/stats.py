"""Counters of one attention site: small, outside any state dict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MAX_REASONS = 16


@dataclass
class Pairs:
    """(query, key) pairs computed and visible, summed over calls; tensors are read only when asked."""

    computed: float | Tensor = 0.0
    visible: float | Tensor = 0.0

    def add(self, computed: float | Tensor, visible: float | Tensor) -> None:
        """Add what one call computed and could see."""
        self.computed = self.computed + (computed.detach() if isinstance(computed, Tensor) else computed)
        self.visible = self.visible + (visible.detach() if isinstance(visible, Tensor) else visible)

    def density(self) -> float | None:
        visible = float(self.visible)
        return float(self.computed) / visible if visible else None


@dataclass
class SiteStats:
    """Counters of one site since the last reset.

    A call ends sparse, dense (chosen by the options or by the mechanism) or as a fallback (it did not fit and ran
    dense). Layers recomputed by gradient checkpointing count twice.
    """

    calls: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    seen: Counter[tuple[int | None, str | None]] = field(default_factory=Counter)
    pairs: Pairs = field(default_factory=Pairs)
    by_step: dict[int | None, Pairs] = field(default_factory=dict)
    q_len: int = 0

    def begin(self, q_len: int, step: int | None, branch: str | None) -> None:
        """A call of `q_len` tokens starts."""
        self.calls += 1
        self.q_len = q_len
        self.seen[step, branch] += 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready counters; `density` is computed over visible pairs of the calls that reported them, or None."""
        steps: dict[str, dict[str, int]] = {}
        for (step, branch), count in self.seen.items():
            steps.setdefault(str(step), {})[branch or ""] = count
        return {
            "calls": self.calls,
            "sparse_calls": self.sparse,
            "dense_calls": sum(self.dense.values()),
            "dense_reasons": dict(self.dense),
            "fallbacks": sum(self.fallbacks.values()),
            "fallback_reasons": dict(self.fallbacks),
            "paths": dict(self.paths),
            "computed_pairs": float(self.pairs.computed),
            "visible_pairs": float(self.pairs.visible),
            "density": self.pairs.density(),
            "density_by_step": {str(step): pairs.density() for step, pairs in self.by_step.items()},
            "calls_by_step": steps,
            "last_q_len": self.q_len,
        }


@dataclass
class CallRecord:
    """Takes what a mechanism reports about one call (`LayerContext.record`), then files the call."""

    stats: SiteStats
    step: int | None
    reason: str | None = None
    fallback: bool = False

    def __call__(
        self,
        *,
        path: str | None = None,
        computed: float | Tensor | None = None,
        visible: float | Tensor | None = None,
        reason: str | None = None,
        fallback: bool = False,
    ) -> None:
        """As `LayerStats.record` of the transformers integration: the same keywords, the same meaning.

        `fallback`: the reason is that the call did not fit what the mechanism was given.
        """
        if path is not None:
            self.stats.paths[path] += 1
        if reason is not None:
            self.reason, self.fallback = reason, fallback
        if computed is not None and visible is not None:
            self.stats.pairs.add(computed, visible)
            self.stats.by_step.setdefault(self.step, Pairs()).add(computed, visible)

    def file(self) -> None:
        """The mechanism has returned: a sparse call, or a dense one when it gave a reason."""
        if self.reason is None:
            self.stats.sparse += 1
        else:
            count_reason(self.stats.fallbacks if self.fallback else self.stats.dense, self.reason)


def count_reason(reasons: Counter[str], reason: str) -> None:
    """Count a reason; ones beyond the first few kinds share a row, as reasons may name lengths."""
    reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else "other reasons"] += 1


def totals(layers: dict[int | str, dict[str, Any]]) -> dict[str, Any]:
    """Sums over layers; `density` is again computed over visible pairs."""
    dense: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    for layer in layers.values():
        dense.update(layer["dense_reasons"])
        fallbacks.update(layer["fallback_reasons"])
    visible = sum(layer["visible_pairs"] for layer in layers.values())
    sums = {
        key: sum(layer[key] for layer in layers.values())
        for key in ("calls", "sparse_calls", "dense_calls", "fallbacks")
    }
    return {
        "layers": len(layers),
        **sums,
        "dense_reasons": dict(dense),
        "fallback_reasons": dict(fallbacks),
        "density": sum(layer["computed_pairs"] for layer in layers.values()) / visible if visible else None,
    }
