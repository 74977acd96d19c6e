"""Quantised block-sparse attention as a custom op; inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import reference, torch_path


def run_reference(
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
    """The reference; arguments as `quantized_block_attention`."""
    count("quantized_block_attention", "reference")
    options = {"q_group": q_group, "k_group": k_group, "qk_bits": qk_bits, "pv_bits": pv_bits, "scale": scale}
    return reference.forward(query, key, value, indices, key_mask, block_q=block_q, block_k=block_k, **options)


@torch.library.custom_op(add_op_namespace_prefix("quantized_block_attention"), mutates_args=(), tags=HOST_SYNC)
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
    """`[B, Hq, Nq, Dv]`; see `reference.forward`."""
    integer = qk_bits is not None and query.device.type == "cpu" and torch_path.has_int8_products()
    count("quantized_block_attention", "torch: int8 products" if integer else "torch")
    options = {"q_group": q_group, "k_group": k_group, "qk_bits": qk_bits, "pv_bits": pv_bits, "scale": scale}
    return torch_path.forward(query, key, value, indices, key_mask, block_q=block_q, block_k=block_k, **options)


@quantized_block_attention.register_fake
def _(query, key, value, indices, key_mask, block_q, block_k, q_group, k_group, qk_bits, pv_bits, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])
