"""Block-sparse and routed block attention: pure tensor functions, forward and backward, on CPU and any device."""

from .block_sparse.op import block_sparse_attention
from .counters import path_counts, reset_path_counts
from .routed.op import routed_block_attention, select_routes
from .selection.op import select_blocks

__all__ = [
    "block_sparse_attention",
    "path_counts",
    "reset_path_counts",
    "routed_block_attention",
    "select_blocks",
    "select_routes",
]
