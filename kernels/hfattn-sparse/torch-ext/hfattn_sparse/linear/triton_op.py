"""Linear attention on Triton as a custom op, with the arguments of that in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from .op import backward_by, empty_gradients, empty_results, save_for_backward


@torch.library.custom_op(add_op_namespace_prefix("linear_attention_triton"), mutates_args=())
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """As `op.linear_attention`; the kernel has block sizes of its own, `block` has no effect."""
    from . import triton_path

    count("linear_attention", "triton")
    return triton_path.forward(query, key, value, slopes, state, cu_seqlens, scale)


linear_attention.register_fake(empty_results)


@torch.library.custom_op(add_op_namespace_prefix("linear_attention_backward_triton"), mutates_args=())
def linear_attention_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the initial state."""
    from . import triton_path

    count("linear_attention_backward", "triton")
    return triton_path.backward(grad_out, grad_state, query, key, value, slopes, state, cu_seqlens, scale)


linear_attention_backward.register_fake(empty_gradients)
linear_attention.register_autograd(backward_by(linear_attention_backward), setup_context=save_for_backward)
