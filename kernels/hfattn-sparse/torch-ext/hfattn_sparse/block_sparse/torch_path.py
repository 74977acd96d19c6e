"""Block-sparse attention in plain PyTorch: no compiler, any device, memory linear in the sequence length."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..counters import count
from . import native_path
from .plans import Plans, plans_of
from .tiling import BlockTable, Geometry, TilePlan, TileRows
from .torch_backward import Gradients, explicit_backward
from .torch_forward import NEG_INF, SAFE_LSE, accumulator, can_fuse, explicit_forward, fused_forward, score_bound

# Calls with fewer scores than this take the most exact route there is; it costs them milliseconds at most.
SMALL = 1 << 21


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j p_ij v_j over keys j of the key blocks that query block `i // block_q` reads.

    Args:
        query, key, value: [B, Hq, Nq, D], [B, Hkv, Nk, D], [B, Hkv, Nk, Dv]; Hq % Hkv == 0; any strides.
        indices: int [B | 1, Hq | Hkv | 1, ceil(Nq / block_q), M], -1 padded anywhere; order and repeats do not matter.
        causal: query row r sees keys up to `r + Nk - Nq`.
        key_bias: added to the scores after `scale`, [B | 1, 1 | Hkv | Hq, Nk]; may hold -inf.

    Returns:
        out [B, Hq, Nq, Dv] in the query's dtype, lse [B, Hq, Nq] in fp32 (fp64 for fp64). A row that sees nothing
        gives 0 and -inf. Keys that a row does not see never reach it, not even as NaN.
    """
    geometry, plans = _plan(query, key, indices, block_q, block_k, causal, key_bias)
    if _native(query, key, value, plans, scale, key_bias):
        return _native_forward(geometry, plans, query, key, value, scale)
    keys, values, bias = _tables(geometry, plans, query, key, value, key_bias)
    fused = can_fuse(query, key, value, key_bias) and sum(plan.scores for _, plan in plans) > SMALL
    # Without a bias no score needs a maximum subtracted, unless the result says so afterwards.
    plain = key_bias is None
    # The fused path merges into what is there, so that has to be zeros.
    complete = bool(plans) and not fused and all(len(plan.tiles) == plan.num_tiles for _, plan in plans)
    shape = (*query.shape[:3], value.shape[3])
    out = query.new_empty(shape) if complete else query.new_zeros(shape)
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=accumulator(query.dtype))
    for rows, plan in plans:
        part, results = query[:, :, rows], (out[:, :, rows], lse[:, :, rows])
        if fused:
            fused_forward(plan, part, keys, values, scale, *results)
        else:
            explicit_forward(plan, part, keys, values, scale, _tile_bias(plan, bias), plain, *results)
            if plain and not bool((results[1].abs() <= SAFE_LSE).all()):
                _shift(plan, part, keys, values, scale, *results)
        if not bool(results[0].sum().isfinite()):
            _repair(plan, part, keys, values, scale, bias, *results)
    return out, lse


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value in their dtypes, and of key_bias (its dtype; None without one).

    Args:
        grad_out, grad_lse: gradients of the two results of `forward`; `grad_lse` may be None.
        out, lse: the results of `forward` on the same inputs. Everything else as in `forward`.
    """
    geometry, plans = _plan(query, key, indices, block_q, block_k, causal, key_bias)
    keys, values, bias = _tables(geometry, plans, query, key, value, key_bias)
    careful = not all(bool(x.sum().isfinite()) for x in (query, key, value))
    bound = float("inf") if careful or key_bias is not None else score_bound(query, key, scale)
    small = sum(plan.scores for _, plan in plans) <= SMALL
    grads = Gradients(keys, values, bias, torch.float64 if small else accumulator(query.dtype))
    complete = bool(plans) and all(len(plan.tiles) == plan.num_tiles for _, plan in plans)
    grad_query = (torch.empty if complete else torch.zeros)(query.shape, dtype=query.dtype, device=query.device)
    for rows, plan in plans:
        part_lse = None if grad_lse is None else grad_lse[:, :, rows]
        tensors = (grad_out[:, :, rows], part_lse, query[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows])
        explicit_backward(
            plan, *tensors, scale, _tile_bias(plan, bias), bound, careful, small, grads, grad_query[:, :, rows]
        )
    grad_key, grad_value = (_from_table(t, x) for t, x in ((grads.key, key), (grads.value, value)))
    grad_bias = None
    if key_bias is not None:
        grad_bias = grads.bias.view(*key_bias.shape[:2], -1)[..., : geometry.k_len].to(key_bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _native(query, key, value, plans: Plans, scale: float, key_bias) -> bool:
    """Whether the compiled kernel takes the call: where it is built, unless it is small or its tiles are thin."""
    if native.obstacle(query, key, value, scale) is not None:
        return False
    if key_bias is not None:
        native.refuse("it takes no key_bias")
        return False
    if native.wanted():
        return True
    if not native.pays(query, value):
        return False
    thin = any(plan.tile_rows < native_path.FEWEST_ROWS for _, plan in plans)
    return not thin and sum(plan.scores for _, plan in plans) > SMALL


def _native_forward(geometry: Geometry, plans, query, key, value, scale: float) -> tuple[Tensor, Tensor]:
    """As `forward`, by the compiled kernel; what comes out not finite is looked at again here."""
    count("block_sparse_attention", "torch: native")
    complete = bool(plans) and all(len(plan.tiles) == plan.num_tiles for _, plan in plans)
    shape = (*query.shape[:3], value.shape[3])
    out = query.new_empty(shape) if complete else query.new_zeros(shape)
    lse = torch.full(query.shape[:3], NEG_INF)
    finite = [native_path.forward(plan, query, key, value, scale, out, lse) for _, plan in plans]
    if not all(finite):
        keys, values, _ = _tables(geometry, plans, query, key, value, None)
        for rows, plan in plans:
            _repair(plan, query[:, :, rows], keys, values, scale, None, out[:, :, rows], lse[:, :, rows])
    return out, lse


def _plan(query, key, indices, block_q: int, block_k: int, causal: bool, key_bias) -> tuple[Geometry, Plans]:
    """Geometry, and the tile plan of every run of equal query blocks; plans of the last patterns are kept."""
    batch, q_heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    block_k = max(1, min(block_k, k_len))
    geometry = Geometry(batch, q_heads, kv_heads, q_len, k_len, block_q, block_k, causal)
    # A bias of its own for every query head keeps the rows of a group apart.
    fold = geometry.group > 1 and (key_bias is None or key_bias.shape[1] in (1, kv_heads))
    return geometry, plans_of(indices, geometry, fold) if query.numel() and k_len else []


def _tables(geometry: Geometry, plans, query, key, value, key_bias):
    """Keys, values and bias as tables of blocks."""
    block_k = geometry.block_k
    few = 2 * sum(plan.work for _, plan in plans) < (geometry.batch * geometry.kv_heads * geometry.key_blocks)
    bias = None
    if key_bias is not None:
        bias = BlockTable(key_bias[..., None].to(accumulator(query.dtype)), block_k)
    return BlockTable(key, block_k, few=few), BlockTable(value, block_k, few=few), bias


def _tile_bias(plan: TilePlan, bias: BlockTable | None):
    """The bias table and the row where the bias of every tile starts."""
    if bias is None:
        return None
    return bias, plan.head_rows(bias.heads) % (bias.batch * bias.heads) * bias.blocks


def _shift(plan: TilePlan, query, keys, values, scale: float, out: Tensor, lse: Tensor) -> None:
    """Recompute, in place and with the maximum subtracted, the tiles whose plain exponentials left the safe range."""
    outside = ~TileRows(lse.abs() <= SAFE_LSE, plan).parts.flatten(0, 2).flatten(1).all(1)
    outside = outside[plan.tiles]
    if bool(outside.any()):
        explicit_forward(plan.subset(outside), query, keys, values, scale, None, False, out, lse)


def _repair(plan: TilePlan, query, keys, values, scale: float, bias, out: Tensor, lse: Tensor) -> None:
    """Recompute, in place, the tiles that are not finite: a hidden NaN or infinity must not spoil rows."""
    broken = ~TileRows(out.isfinite(), plan).parts.flatten(0, 2).flatten(1).all(1)
    part = plan.subset(broken[plan.tiles])
    explicit_forward(part, query, keys, values, scale, _tile_bias(part, bias), False, out, lse, careful=True)


def _from_table(table: Tensor, like: Tensor) -> Tensor:
    """[B * H * blocks, block * D] -> [B, H, N, D] in the dtype of `like`."""
    batch, heads, length, dim = like.shape
    return table.view(batch, heads, -1, dim)[:, :, :length].to(like.dtype)
