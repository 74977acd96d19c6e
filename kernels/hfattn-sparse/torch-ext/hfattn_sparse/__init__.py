"""Block-sparse, routed, paged and linear attention: pure tensor functions on CPU and any device."""

from .api import (
    block_sparse_attention,
    linear_attention,
    page_scores,
    page_statistics,
    paged_attention,
    routed_block_attention,
    select_blocks,
    select_pages,
    select_routes,
)
from .attention import flash_attn_forward
from .counters import path_counts, reset_path_counts

# What transformers looks for beside `flash_attn_forward` in a kernel that is named as attn_implementation.
supports_flash_attn = True

__all__ = [
    "block_sparse_attention",
    "flash_attn_forward",
    "linear_attention",
    "page_scores",
    "page_statistics",
    "paged_attention",
    "path_counts",
    "reset_path_counts",
    "routed_block_attention",
    "select_blocks",
    "select_pages",
    "select_routes",
    "supports_flash_attn",
]
