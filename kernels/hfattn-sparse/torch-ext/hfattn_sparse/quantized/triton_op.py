"""Quantised block-sparse attention on Triton as a custom op, with the arguments of that in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count


@torch.library.custom_op(add_op_namespace_prefix("quantized_block_attention_triton"), mutates_args=())
def quantized_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    key_mask: Tensor | None,
    block_q: int,
    block_k: int,
    q_group: int,
    k_group: int,
    qk_bits: int | None,
    pv_bits: int | None,
    scale: float,
) -> Tensor:
    """`[B, Hq, Nq, Dv]`; see `triton_path.forward`."""
    from . import triton_path

    count("quantized_block_attention", "triton")
    options = (block_q, block_k, q_group, k_group, qk_bits, pv_bits, scale)
    return triton_path.forward(query, key, value, indices, key_mask, *options)


@quantized_block_attention.register_fake
def _(query, key, value, indices, key_mask, block_q, block_k, q_group, k_group, qk_bits, pv_bits, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])
