"""Routed block attention and its routing as custom ops: sequences are cut out here, the cores see one each."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, split_sequences, take
from . import reference, routing, torch_path


@torch.library.custom_op(add_op_namespace_prefix("select_routes"), mutates_args=(), tags=HOST_SYNC)
def select_routes(
    query: Tensor, key: Tensor, index: Tensor | None, block_size: int, top_k: int, causal: bool
) -> Tensor:
    """Blocks each query attends to, int32 `[B, Hq, Nq, min(top_k, ceil(Nk / block_size))]`, ascending, -1 padded.

    Block ids count from the first real key of each sequence. No gradient.
    """
    count("select_routes", "torch")
    return _routes_over_sequences(routing.select_routes, query, key, index, block_size, top_k, causal)


@select_routes.register_fake
def _(query, key, index, block_size, top_k, causal):
    return query.new_empty(*query.shape[:3], _route_width(key, block_size, top_k), dtype=torch.int32)


def select_routes_reference(
    query: Tensor, key: Tensor, index: Tensor | None, block_size: int, top_k: int, causal: bool
) -> Tensor:
    """The reference form of `select_routes`."""
    count("select_routes", "reference")
    with torch.no_grad():
        return _routes_over_sequences(reference.select_routes, query, key, index, block_size, top_k, causal)


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    index: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `routed_block_attention`."""
    count("routed_block_attention", "reference")
    options = {"block_size": block_size, "causal": causal, "scale": scale}
    return _over_sequences(reference.forward, query, key, value, routes, index, options)


@torch.library.custom_op(add_op_namespace_prefix("routed_block_attention"), mutates_args=(), tags=HOST_SYNC)
def routed_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    index: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        routes: int `[B, Hq, Nq, k]`, block ids of each query's sequence, -1 padded, ids beyond its blocks are ignored;
            or bool `[B, Hq, Nq, n]`.
        index: token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
        allow_dense: let the torch path compute a nearly dense selection in a dense form, where that is faster.
    """
    options = {"block_size": block_size, "causal": causal, "scale": scale, "allow_dense": allow_dense}
    return _over_sequences(torch_path.forward, query, key, value, routes, index, options)


@routed_block_attention.register_fake
def _(query, key, value, routes, index, block_size, causal, scale, allow_dense):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=_stat_dtype(query))


@torch.library.custom_op(add_op_namespace_prefix("routed_block_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def routed_block_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    count("routed_block_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    for s in split_sequences(index, query.shape[2], key.shape[2], causal):
        keys = take(key, s.batch, s.k)
        dq, dk, dv = torch_path.backward(
            take(grad_out, s.batch, s.q),
            None if grad_lse is None else take(grad_lse, s.batch, s.q),
            take(query, s.batch, s.q),
            keys,
            take(value, s.batch, s.k),
            _existing(take(routes, s.batch, s.q), keys, block_size),
            take(out, s.batch, s.q),
            take(lse, s.batch, s.q),
            block_size=block_size,
            causal=causal,
            scale=scale,
            allow_dense=allow_dense,
        )
        grads[0][s.batch, :, s.q] = dq.to(query.dtype)
        grads[1][s.batch, :, s.k] = dk.to(key.dtype)
        grads[2][s.batch, :, s.k] = dv.to(value.dtype)
    return tuple(grads)


@routed_block_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, routes, index, out, lse, block_size, causal, scale, allow_dense):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, routes, index, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, routes, index, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, routes, index, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = routed_block_attention_backward(
        grad_out, grad_lse, query, key, value, routes, index, out, lse, *ctx.options
    )
    return *grads, None, None, None, None, None, None


routed_block_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _over_sequences(core, query, key, value, routes, index, options) -> tuple[Tensor, Tensor]:
    if index is None:
        return core(query, key, value, _existing(routes, key, options["block_size"]), **options)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=_stat_dtype(query))
    for s in split_sequences(index, query.shape[2], key.shape[2], options["causal"]):
        q, k, v = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        chosen = _existing(take(routes, s.batch, s.q), k, options["block_size"])
        out[s.batch, :, s.q], lse[s.batch, :, s.q] = core(q, k, v, chosen, **options)
    return out, lse


def _existing(routes: Tensor, key: Tensor, block_size: int) -> Tensor:
    """The routes without block ids that this sequence does not have."""
    num_blocks = -(-key.shape[2] // block_size)
    if routes.dtype == torch.bool:
        return routes[..., :num_blocks]
    if routes.numel() == 0 or int(routes.max()) < num_blocks:
        return routes
    return torch.where(routes < num_blocks, routes, -1)


def _routes_over_sequences(select, query, key, index, block_size, top_k, causal) -> Tensor:
    options = {"block_size": block_size, "top_k": top_k, "causal": causal}
    if index is None:
        return select(query, key, **options)
    routes = query.new_full((*query.shape[:3], _route_width(key, block_size, top_k)), -1, dtype=torch.int32)
    for s in split_sequences(index, query.shape[2], key.shape[2], causal):
        chosen = select(take(query, s.batch, s.q), take(key, s.batch, s.k), **options)
        routes[s.batch, :, s.q, : chosen.shape[3]] = chosen
    return routes


def _route_width(key: Tensor, block_size: int, top_k: int) -> int:
    blocks = (key.shape[2] + block_size - 1) // block_size
    return torch.sym_min(top_k, blocks)


def _stat_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
