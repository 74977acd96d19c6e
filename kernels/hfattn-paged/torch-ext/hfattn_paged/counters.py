"""How often each op ran on each path: tests and `stats` prove with it that a sparse path was really taken."""

from __future__ import annotations

from collections import Counter

_calls: Counter[str] = Counter()


def count(op: str, path: str) -> None:
    """Note one run of `op` on `path`, e.g. `("paged_attention", "torch")`."""
    _calls[f"{op} | {path}"] += 1


def path_counts() -> dict[str, int]:
    """Runs since the last `reset_path_counts`, keyed `"op | path"`."""
    return dict(_calls)


def reset_path_counts() -> None:
    """Forget all counts."""
    _calls.clear()
