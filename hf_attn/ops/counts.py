"""How often each op ran on each path, over all kernel folders."""

from __future__ import annotations

from hf_attn.ops.hfattn_paged import counters as paged
from hf_attn.ops.hfattn_sparse import counters as sparse


def path_counts() -> dict[str, int]:
    """Runs since the last `reset_path_counts`, keyed `"op | path"`."""
    return sparse.path_counts() | paged.path_counts()


def reset_path_counts() -> None:
    """Forget all counts."""
    sparse.reset_path_counts()
    paged.reset_path_counts()
