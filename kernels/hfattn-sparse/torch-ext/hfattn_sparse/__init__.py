"""Block-sparse and routed block attention: pure tensor functions, forward and backward, on CPU and any device."""

from .api import block_sparse_attention, routed_block_attention, select_blocks, select_routes
from .attention import flash_attn_forward
from .counters import path_counts, reset_path_counts

# What transformers looks for beside `flash_attn_forward` in a kernel that is named as attn_implementation.
supports_flash_attn = True

__all__ = [
    "block_sparse_attention",
    "flash_attn_forward",
    "path_counts",
    "reset_path_counts",
    "routed_block_attention",
    "select_blocks",
    "select_routes",
    "supports_flash_attn",
]
