"""Quantised block-sparse attention by a Triton kernel: codes, lists, launch. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..block_sparse.triton_lists import unique_lists
from ..launch import config, interpreting, launch
from .codes import qmax, quantize_channels, quantize_groups
from .triton_kernels import forward_kernel

LARGEST_BLOCK = 128


def forward(
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
    """`[B, Hq, Nq, Dv]`; arguments as in `op.quantized_block_attention`. Raises ValueError for blocks above 128."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    block_q, block_k = max(1, min(block_q, q_len)), max(1, min(block_k, k_len))
    if max(block_q, block_k) > LARGEST_BLOCK:
        raise ValueError(
            f"the Triton kernel takes blocks of at most {LARGEST_BLOCK} tokens, got {block_q} and {block_k}"
        )
    out = torch.empty(batch, heads, q_len, value_dim, dtype=query.dtype, device=query.device)
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        key_mask = key_mask.contiguous().view(torch.uint8)
    dtype, q_scale, k_scale, v_scale = query.dtype, None, None, None
    if qk_bits is not None:
        query, q_scale = quantize_groups(query, qk_bits, q_group)
        key, k_scale = quantize_groups(key, qk_bits, k_group)
    if pv_bits is not None:
        value, v_scale = quantize_channels(value, pv_bits)
    lists = unique_lists(indices, -(-k_len // block_k))
    widths = [max(16, triton.next_power_of_2(d)) for d in (dim, value_dim)]
    # Integer products need at least 32 codes in a row.
    if qk_bits is not None:
        widths[0] = max(32, widths[0])
    least = 16 if pv_bits is None else 32
    tile = config("quantized_block_forward", dtype=dtype, head_dim=max(widths), device=query.device)
    launch(
        forward_kernel, (lists.shape[2], heads, batch),
        query, key, value, q_scale, k_scale, v_scale, key_mask, lists, out,
        *query.stride(), *key.stride(), *value.stride(),
        0 if key_mask is None or key_mask.shape[0] == 1 else key_mask.stride(0),
        q_len, k_len, heads // kv_heads, block_q, block_k, q_group, k_group, -(-q_len // q_group), -(-k_len // k_group),
        lists.shape[2], lists.shape[0], lists.shape[1], lists.shape[3], heads // lists.shape[1], scale * LOG2E.value,
        float(qmax(pv_bits or 8)),
        D=dim, DV=value_dim, WIDTH=widths[0], WIDTH_V=widths[1],
        BLOCK_M=max(16, triton.next_power_of_2(block_q)), BLOCK_N=max(least, triton.next_power_of_2(block_k)),
        CODES=qk_bits is not None, P_CODES=pv_bits is not None,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=interpreting() and dtype == torch.bfloat16, **tile,
    )  # fmt: skip
    return out
