"""Attention to sinks and a window by a Triton kernel: tables and launch. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..device_sequences import device_sequences
from ..launch import config, interpreting, launch
from .triton_kernels import forward_kernel


def forward(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, sinks: int, window: int, scale: float
) -> Tensor:
    """`[B, Hq, Nq, Dv]`; arguments as in `op.sink_window_attention`."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    widths = [max(16, triton.next_power_of_2(d)) for d in (dim, value_dim)]
    tile = config("sink_window_attention", dtype=query.dtype, head_dim=max(widths), device=query.device)
    # With tokens looked up one by one, narrower tiles keep the kernel from spilling.
    tile["BLOCK_N"] = min(tile["BLOCK_N"], tile["BLOCK_N"] if index is None else 64)
    programs = -(-q_len // tile["BLOCK_M"])
    tables = (None,) * 4
    # Rows that belong to no sequence are written by nobody.
    make = torch.empty if index is None else torch.zeros
    out = make(batch, heads, q_len, value_dim, dtype=query.dtype, device=query.device)
    if index is not None:
        found = device_sequences(index, q_len, k_len, True)
        tiles = found.query_tiles(tile["BLOCK_M"])
        tables = (found.q_rows, found.k_rows, tiles.count, torch.stack(tiles[1:], 1))
    # A window beyond all keys is the same as one over all of them, and fits the kernel's integers.
    sinks, window = min(sinks, k_len), min(window, max(k_len, 1))
    launch(
        forward_kernel, (programs, heads, batch),
        query, key, value, out, *tables, *query.stride(), *key.stride(), *value.stride(), heads, heads // kv_heads,
        q_len, k_len, sinks, window, programs, scale * LOG2E.value,
        D=dim, DV=value_dim, WIDTH=widths[0], WIDTH_V=widths[1],
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=interpreting() and query.dtype == torch.bfloat16, **tile,
    )  # fmt: skip
    return out
