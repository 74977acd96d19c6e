"""Pyramid attention in half precision on a CPU: every tile is one call of PyTorch's fused attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_sparse.tiling import Workspace
from .pooling import UNITS, last_positions, pool_counts, write_pools
from .tiles import EXTRA, Plan, per_head

NEG_INF = float("-inf")
# Stands for -inf in the columns of the bias, whose products must stay finite in fp16.
HIDDEN = -3e4
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def can_fuse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether PyTorch's fused CPU attention takes the call: half precision, one head dimension, a positive scale."""
    return (
        _fused is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[3] == key.shape[3]
        and scale > 0
    )


def forward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_k: int,
    scale: float,
    tail: str,
) -> None:
    """Writes out and lse. Pooled keys are rounded to half precision; the weights ride in two extra columns.

    The fused kernel slows down under a mask, so ln(w) is added by the product itself: queries get the columns 1, 1 and
    keys ln(w) / scale in two parts of half precision.
    """
    dim, k_len = key.shape[3], key.shape[2]
    weights, members = pool_counts(k_len, block_k, tail, key.device)
    bias = weights.clamp(min=1).log() / scale
    first = bias.to(key.dtype)
    keys, values = (torch.zeros(*weights.shape, dim + EXTRA, dtype=key.dtype, device=key.device) for _ in range(2))
    keys[..., dim] = first.masked_fill(weights == 0, HIDDEN)
    keys[..., dim + 1] = (bias - first).masked_fill(weights == 0, 0).to(key.dtype)
    tables = [x.view(weights.shape[0] * UNITS, -1) for x in (keys, values)]
    last = last_positions(k_len, block_k, tail, key.device).view(-1, block_k // 8)
    work = Workspace()
    queries, outs, lses = plan.split(query), plan.split(out), plan.split(lse)
    for row, (own_keys, own_values) in enumerate(zip(per_head(key), per_head(value), strict=True)):
        write_pools(keys, own_keys, block_k, tail, members)
        write_pools(values, own_values, block_k, tail, members)
        for tile in plan.tiles(row):
            part = work.get("query", (len(tile.rows), dim + EXTRA), query.dtype, query.device)
            part[:, :dim] = queries[tile.number]
            part[:, dim : dim + 2], part[:, dim + 2 :] = 1, 0
            picked = [
                work.pick(name, table, tile.units).view(1, 1, -1, dim + EXTRA)
                for name, table in zip(("keys", "values"), tables, strict=True)
            ]
            hidden, mask = tile.hidden(last, k_len - query.shape[2]), None
            if hidden is not None:
                mask = torch.zeros(1, 1, len(part), picked[0].shape[2], dtype=query.dtype)
                mask[0, 0, :, -hidden.shape[1] :].masked_fill_(hidden, NEG_INF)
            result, log = _fused(part[None, None], *picked, attn_mask=mask, scale=scale)
            outs[tile.number].copy_(result[0, 0, :, :dim])
            lses[tile.number].copy_(log.view(-1))
            if hidden is not None:  # the kernel says 0 where a row sees nothing
                lses[tile.number].masked_fill_((mask == NEG_INF).all(-1)[0, 0], NEG_INF)
