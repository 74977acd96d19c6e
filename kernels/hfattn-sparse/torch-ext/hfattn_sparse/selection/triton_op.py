"""Block selection by Triton kernels as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from . import triton_path
from .op import result_shape
from .rule import Rule


@torch.library.custom_op(add_op_namespace_prefix("select_blocks_triton"), mutates_args=())
def select_blocks_triton(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    sinks: int,
    local: int,
    causal: bool,
    scale: float,
    sequences: int,
) -> Tensor:
    """As `op.select_blocks`. Never waits for the device: sequences beyond `sequences` get no blocks."""
    count("select_blocks", "triton")
    chosen_by = Rule(rule, amount, sinks, local, causal, block_q, block_k)
    shape = result_shape(query, key, chosen_by, sequences)
    return triton_path.select_blocks(query, key, index, chosen_by, scale=scale, sequences=sequences, shape=shape)


@select_blocks_triton.register_fake
def _(query, key, index, block_q, block_k, rule, amount, sinks, local, causal, scale, sequences):
    return query.new_empty(
        result_shape(query, key, Rule(rule, amount, sinks, local, causal, block_q, block_k), sequences),
        dtype=torch.int32,
    )
