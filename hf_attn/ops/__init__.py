"""Public functional ops: validation and dispatch to a kernel.

Layouts are `[B, H, N, D]` at every border. `HF_ATTN_BACKEND=reference|torch|native|triton` forces a path and fails
loudly when it cannot run; unset, the fastest path for the device is taken.
"""

from pathlib import Path

# Wheels carry the kernels as real subpackages; a source tree or an editable install finds them beside the package.
_kernel_sources = Path(__file__).resolve().parents[2] / "kernels"
if (_kernel_sources / ".hf_attn_kernels").is_file():
    __path__.extend(str(path) for path in sorted(_kernel_sources.glob("*/torch-ext")))

from hf_attn.ops.backend import choose_path  # noqa: E402
from hf_attn.ops.bilevel import bilevel_routing_attention, select_regions  # noqa: E402
from hf_attn.ops.block_sparse import block_sparse_attention  # noqa: E402
from hf_attn.ops.deformable import ms_deform_attn  # noqa: E402
from hf_attn.ops.dense import dense_attention  # noqa: E402
from hf_attn.ops.documents import document_attention, document_scores  # noqa: E402
from hf_attn.ops.grouped import grouped_softmax_attention  # noqa: E402
from hf_attn.ops.head_routed import head_routed_attention  # noqa: E402
from hf_attn.ops.hfattn_sparse.counters import path_counts, reset_path_counts  # noqa: E402
from hf_attn.ops.key_convolution import key_convolution  # noqa: E402
from hf_attn.ops.linear import linear_attention  # noqa: E402
from hf_attn.ops.neighborhood import (  # noqa: E402
    merge_attentions,
    na_av,
    na_qk,
    neighborhood_attention,
    neighborhood_mask,
)
from hf_attn.ops.neural_memory import (  # noqa: E402
    ChunkWeights,
    MemoryStates,
    chunk_gated_memory,
    memory_coefficients,
    neural_memory,
    read_memory,
)
from hf_attn.ops.paged import page_scores, page_statistics, paged_attention, select_pages  # noqa: E402
from hf_attn.ops.pooled_routes import block_scores, select_pooled_routes  # noqa: E402
from hf_attn.ops.pyramid import (  # noqa: E402
    antidiagonal_importance,
    assign_levels,
    pyramid_attention,
    pyramid_pairs,
    sampled_importance,
    select_levels,
    similarity_cap,
)
from hf_attn.ops.quantized import quantized_block_attention  # noqa: E402
from hf_attn.ops.routed import key_block_major, routed_block_attention, select_routes  # noqa: E402
from hf_attn.ops.selection import select_blocks  # noqa: E402
from hf_attn.ops.selective import selective_attention  # noqa: E402
from hf_attn.ops.selective_scan import selective_scan  # noqa: E402
from hf_attn.ops.spanned_window import spanned_window_attention  # noqa: E402
from hf_attn.ops.windowed import gated_streaming_attention, sink_window_attention  # noqa: E402

__all__ = [
    "ChunkWeights",
    "MemoryStates",
    "antidiagonal_importance",
    "assign_levels",
    "bilevel_routing_attention",
    "block_scores",
    "block_sparse_attention",
    "choose_path",
    "chunk_gated_memory",
    "dense_attention",
    "document_attention",
    "document_scores",
    "gated_streaming_attention",
    "grouped_softmax_attention",
    "head_routed_attention",
    "key_block_major",
    "key_convolution",
    "linear_attention",
    "ms_deform_attn",
    "merge_attentions",
    "na_av",
    "na_qk",
    "neighborhood_attention",
    "neighborhood_mask",
    "memory_coefficients",
    "neural_memory",
    "page_scores",
    "page_statistics",
    "paged_attention",
    "path_counts",
    "pyramid_attention",
    "pyramid_pairs",
    "quantized_block_attention",
    "read_memory",
    "reset_path_counts",
    "routed_block_attention",
    "select_blocks",
    "sampled_importance",
    "select_levels",
    "select_pooled_routes",
    "select_routes",
    "similarity_cap",
    "select_pages",
    "select_regions",
    "selective_attention",
    "selective_scan",
    "sink_window_attention",
    "spanned_window_attention",
]
