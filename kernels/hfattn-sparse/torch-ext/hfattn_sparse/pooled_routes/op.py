"""Choice of key blocks from pools of scores as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC
from . import reference, torch_path


def select_pooled_routes_reference(
    query: Tensor, key: Tensor, own: Tensor, block_size: int, rule: str, scope: str, amount: float
) -> Tensor:
    """The reference form of `select_pooled_routes`."""
    count("select_pooled_routes", "reference")
    with torch.no_grad():
        scores = reference.block_scores(query, key, block_size)
        return reference.select(scores, own, rule=rule, scope=scope, amount=amount).contiguous()


@torch.library.custom_op(add_op_namespace_prefix("select_pooled_routes"), mutates_args=(), tags=HOST_SYNC)
def select_pooled_routes(
    query: Tensor, key: Tensor, own: Tensor, block_size: int, rule: str, scope: str, amount: float
) -> Tensor:
    """Chosen (block, query) pairs, bool `[B, Hq, ceil(Nk / block_size), Nq]`; arguments as the public op has them."""
    count("select_pooled_routes", "torch")
    scores = torch_path.block_scores(query, key, block_size)
    return torch_path.select(scores, own, rule=rule, scope=scope, amount=amount).contiguous()


@select_pooled_routes.register_fake
def _(query, key, own, block_size, rule, scope, amount):
    blocks = (key.shape[2] + block_size - 1) // block_size
    return query.new_empty(query.shape[0], query.shape[1], blocks, query.shape[2], dtype=torch.bool)
