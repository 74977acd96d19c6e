"""Pyramid attention by a Triton kernel: the pyramid, lists of blocks by level, and the launch.

Nothing here waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..launch import config, interpreting, launch
from .pooling import LEVELS, last_positions, num_blocks, pool_counts, write_pools
from .triton_kernels import forward_kernel, pool_kernel

# Tokens of a block that the pooling kernel takes at once.
LARGEST_POOLED = 256


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` in the query's dtype and lse `[B, Hq, Nq]` in fp32; arguments as the reference.

    Pools are formed in fp32 and kept in the dtype of the keys.
    """
    batch, heads, q_len, dim = query.shape
    k_len, value_dim, device = key.shape[2], value.shape[3], query.device
    if not k_len:
        out = query.new_zeros(batch, heads, q_len, value_dim)
        return out, torch.full(query.shape[:3], float("-inf"), dtype=torch.float32, device=device)
    inverse, shift, ends = _tables_for(k_len, block_k, tail, device)
    tables = [_pyramid(x, block_k, tail, inverse) for x in (key, value)]
    q_blocks, k_blocks = num_blocks(q_len, block_q), num_blocks(k_len, block_k)
    ids, counts = block_lists(levels[:, :, :q_blocks, :k_blocks])
    out = torch.empty(batch, heads, q_len, value_dim, dtype=query.dtype, device=device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    widths = [max(16, triton.next_power_of_2(d)) for d in (dim, value_dim)]
    tile = config("pyramid_attention", dtype=query.dtype, head_dim=max(widths), device=device)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], max(16, triton.next_power_of_2(block_q)))
    subs = -(-block_q // tile["BLOCK_M"])
    launch(
        forward_kernel, (q_blocks * subs, heads, batch),
        query, *tables, out, lse, ids, counts, shift, ends, *query.stride(), heads, heads // key.shape[1], q_len,
        q_blocks, k_blocks, ids.shape[0], ids.shape[1], block_q, block_k, subs, k_len - q_len, scale * LOG2E.value,
        D=dim, DV=value_dim, WIDTH=widths[0], WIDTH_V=widths[1], CAUSAL=causal,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=interpreting() and query.dtype == torch.bfloat16, **tile,
    )  # fmt: skip
    return out, lse


def block_lists(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Key blocks of every query block, those of level 1 first, then 2, 4, 8 and the skipped ones, each ascending.

    Returns int32 `[.., nq, nk]`, and how many have level 1, 2, 4, 8: int32 `[.., nq, 4]`.
    """
    blocks = levels.shape[-1]
    # Places 0 to 3 of levels 1, 2, 4 and 8; skipped blocks come last.
    wide = levels.int()
    places = (wide > 1).int() + (wide > 2).int() + (wide > 4).int() + (wide == 0).int() * len(LEVELS)
    order = places * blocks + torch.arange(blocks, dtype=torch.int32, device=levels.device)
    counts = torch.stack([(levels == level).sum(-1, dtype=torch.int32) for level in LEVELS], -1)
    return order.sort(-1).values.remainder(blocks).contiguous(), counts.contiguous()


def _pyramid(x: Tensor, block: int, tail: str, inverse: Tensor) -> Tensor:
    """[B, H, N, D] as all its pools, `[B, H, n, 15 b / 8, D]`."""
    batch, heads, length, dim = x.shape
    table = torch.empty(batch, heads, *inverse.shape, dim, dtype=x.dtype, device=x.device)
    if block & (block - 1) or block < LEVELS[-1] or block > LARGEST_POOLED:
        write_pools(table, x, block, tail, (1 / inverse).round())
        return table
    tile = max(16, min(64, triton.next_power_of_2(dim)))
    launch(
        pool_kernel, (inverse.shape[0], -(-dim // tile), batch * heads),
        x, table, inverse, *x.stride(), heads, length, inverse.shape[0], D=dim, TILE=tile, BLOCK=block,
        CLAMP=tail == "replicate", num_warps=4,
    )  # fmt: skip
    return table


def _tables_for(length: int, block: int, tail: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What sizes decide, `[n, 15 b / 8]`: one over members fp32, log2 of weights fp32, last position int32."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # What is made while a graph is captured lives in its memory, and must not outlive it.
    make = _make_tables if capturing or device.type == "meta" else _kept_tables
    return make(length, block, tail, device)


def _make_tables(length: int, block: int, tail: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        weights, members = pool_counts(length, block, tail, device)
        ends = last_positions(length, block, tail, device).to(torch.int32)
        return 1 / members.float(), weights.float().log2(), ends.contiguous()


_kept_tables = lru_cache(16)(_make_tables)
