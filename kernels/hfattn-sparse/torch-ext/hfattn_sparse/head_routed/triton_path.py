"""Head-routed attention by Triton kernels: lists of the rows that chose a head, and launches. Nothing waits here."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..block_sparse.triton_common import LOG2E
from ..device_sequences import device_sequences
from ..launch import config, interpreting, launch
from .triton_kernels import forward_kernel, keys_kernel, queries_kernel


class RowLists(NamedTuple):
    """The query rows of every head, those that chose it first, in the order of their sequences.

    rows, low, high: int32 `[B, H, Nq]`: tensor row, and the key slots `low` to `high` - 1 that it sees.
    count: int32 `[B, H]`, rows that chose the head. k_rows: int32 `[B, Nk]`, tensor row of each key slot, None where
    they are the same.
    """

    rows: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    k_rows: Tensor | None


def row_lists(heads: Tensor, index: Tensor | None, k_len: int, causal: bool) -> RowLists:
    """Lists of a call's rows; rows that see no key are in none."""
    batch, count, q_len = heads.shape
    if index is None:
        slots = torch.arange(q_len, device=heads.device).expand(batch, q_len)
        rows, k_rows, low = slots, None, torch.zeros_like(slots)
        high = (slots + k_len - q_len + 1).clamp(min=0) if causal else torch.full_like(slots, k_len)
    else:
        found = device_sequences(index, q_len, k_len, causal)
        rows, k_rows, low = found.q_rows.long(), found.k_rows, found.k_first.long()
        slots = torch.arange(q_len, device=heads.device)
        high = found.k_length if not causal else slots - found.q_first + found.k_length - found.q_length + 1
        high = torch.where(found.q_length > 0, low + high.clamp(min=0), low)
    chosen = heads.gather(2, rows[:, None].expand(-1, count, -1)) & (high > low)[:, None]
    order = (~chosen).to(torch.uint8).sort(dim=2, stable=True).indices
    picked = (x[:, None].expand(-1, count, -1).gather(2, order).to(torch.int32).contiguous() for x in (rows, low, high))
    return RowLists(*picked, chosen.sum(2, dtype=torch.int32), k_rows)


def forward(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, index: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`; arguments as in `op.head_routed_attention`."""
    batch, count, q_len = query.shape[:3]
    lists = row_lists(heads, index, key.shape[2], causal)
    tile, shape = _tile("head_routed_forward", query, value), _shape(query, value)
    out = query.new_zeros(batch, count, q_len, value.shape[3])
    lse = torch.full((batch, count, q_len), float("-inf"), dtype=torch.float32, device=query.device)
    launch(
        forward_kernel, (-(-q_len // tile["BLOCK_M"]), count, batch),
        query, key, value, out, lse, *lists, *query.stride(), *key.stride(), *value.stride(), count // key.shape[1],
        q_len, key.shape[2], scale * LOG2E.value, **shape, **tile,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    batch, count, q_len = query.shape[:3]
    kv_heads, k_len = key.shape[1:3]
    lists, shape = row_lists(heads, index, k_len, causal), _shape(query, value)
    grad_out = grad_out.contiguous()
    delta = (grad_out.float() * out.float()).sum(-1)
    grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    strides = (*query.stride(), *key.stride(), *value.stride())
    rest = (*lists, *strides, count // kv_heads, q_len, k_len, scale)
    tile = _tile("head_routed_backward_queries", query, value)
    launch(
        queries_kernel, (-(-q_len // tile["BLOCK_M"]), count, batch),
        query, key, value, grad_out, lse, delta, grads[0], *rest, **shape, **tile,
    )  # fmt: skip
    tile = _tile("head_routed_backward_keys", query, value)
    launch(
        keys_kernel, (-(-k_len // tile["BLOCK_N"]), kv_heads, batch),
        query, key, value, grad_out, lse, delta, grads[1], grads[2], *rest, **shape, **tile,
    )  # fmt: skip
    return tuple(grads)


def _tile(kernel: str, query: Tensor, value: Tensor) -> dict[str, int]:
    width = max(16, *(triton.next_power_of_2(x.shape[3]) for x in (query, value)))
    return config(kernel, dtype=query.dtype, head_dim=width, device=query.device)


def _shape(query: Tensor, value: Tensor) -> dict:
    dim, value_dim = query.shape[3], value.shape[3]
    return {
        "D": dim,
        "DV": value_dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "WIDTH_V": max(16, triton.next_power_of_2(value_dim)),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
    }
