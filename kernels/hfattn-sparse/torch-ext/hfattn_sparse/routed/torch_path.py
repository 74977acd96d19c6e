"""Fast path of routed block attention in plain torch: forward and backward, any device, no compiler needed.

Every query row names the key blocks it reads. Five forms compute the same: "gathered" touches only chosen blocks;
"flash tiles" does so by torch's fused kernel, where that can run (not causal, CPU), and "native" by the compiled one,
where that is built and pays (forward only); "masked tiles" computes all visible scores under a mask, which is faster
when most of them are chosen; "dense" is that without the mask, when all are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..counters import count
from . import dense, few_rows, flash_tiles, native_path, tiles
from .gathered import GatheredGroup
from .layout import Geometry, clean_routes, complete_rows, density
from .workspace import Workspace

# Fewer leading rows than this are not worth a call of their own.
SHORTEST_PREFIX = 256


def plan(
    routes: torch.Tensor, *, q_len: int, k_len: int, block_size: int, causal: bool, allow_dense: bool = True
) -> str:
    """Form that `forward` and `backward` take for these routes: "gathered", "masked tiles" or "dense".

    Args:
        routes: int [B, Hq, Nq, K], padded with -1.
        allow_dense: False: always "gathered".
    """
    shape = Geometry(q_len, k_len, block_size, causal)
    if few_rows.applies(routes, shape):
        return "gathered"
    return _form(clean_routes(routes), shape, allow_dense)[0]


def _form(routes: torch.Tensor, shape: Geometry, allow_dense: bool) -> tuple[str, int]:
    """Form of a call for clean routes, and how many leading rows are computed as plain attention before it.

    Early rows have so few blocks that they read all of them; plain attention needs no routes for those.
    """
    if not allow_dense:
        return "gathered", 0
    skip = complete_rows(routes, shape) if shape.causal and shape.q_len == shape.k_len else 0
    if skip == shape.q_len and skip:
        return "dense", skip
    if skip < SHORTEST_PREFIX:
        skip = 0
    rest = Geometry(shape.q_len - skip, shape.k_len, shape.block_size, shape.causal)
    # Measured, ns for a visible pair (D = 64, one thread): both grow for small blocks, gathering much more.
    limit = min(1.0, (2.3 + 22 / shape.block_size) / (1.0 + 240 / shape.block_size))
    if routes.shape[3] * shape.block_size * rest.q_len < limit * rest.visible_pairs:
        return "gathered", skip
    share = density(routes[:, :, skip:], rest)
    if share == 1.0:
        return "dense", 0
    return "masked tiles" if share > limit else "gathered", skip


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every row over the keys of its blocks.

    Row r attends key j iff block j // block_size is in routes[r] and, if causal, j <= r + Nk - Nq.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D]; value: [B, Hkv, Nk, Dv]; any strides, Hq a multiple of Hkv.
        routes: int [B, Hq, Nq, K], padded with -1, any order, a repeated block counts once; or bool [B, Hq, Nq, n].
        block_size: keys per block, >= 1; the last block may be shorter.
        scale: factor of the scores.
        allow_dense: False: compute only chosen blocks however many there are.

    Returns:
        out [B, Hq, Nq, Dv] in the type of the query, and lse [B, Hq, Nq] in float32 (float64 for float64), natural
        logarithm. Rows that see no key: out 0, lse -inf.
    """
    shape = Geometry(query.shape[2], key.shape[2], block_size, causal)
    dtype = _computing_type(query)
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, heads, rows, value.shape[-1])
    lse = query.new_empty(batch, heads, rows, dtype=dtype)
    if not out.numel() or not shape.k_len:
        return out.zero_(), lse.fill_(-torch.inf)
    work = Workspace(query.device)
    by_native = native_path.takes(query, key, value, shape, scale)
    by_flash = flash_tiles.can_run(query, key, value, shape)
    if routes.dtype == torch.bool:
        if (by_native or by_flash) and not (allow_dense and bool(routes.all())):
            _tiles_forward(by_native, query, key, value, routes, shape, scale, out, lse, work)
            return out, lse
        routes = flash_tiles.routes_of(routes)
    routes = clean_routes(routes)
    if not by_native and few_rows.applies(routes, shape):
        count("routed_block_attention", "torch: few rows")
        few_rows.forward(query, key, value, routes, shape, scale, out, lse, work)
        return out, lse
    form, skip = _form(routes, shape, allow_dense)
    if (by_native or by_flash) and form != "dense":
        _tiles_forward(by_native, query, key, value, routes, shape, scale, out, lse, work)
        return out, lse
    count("routed_block_attention", f"torch: {form}")
    if form == "dense":
        _plain_forward(query, key, value, shape, scale, out, lse, work)
        return out, lse
    rest = replace(shape, skip=skip)
    if form == "masked tiles":
        tiles.forward(query, key, value, routes, rest, scale, out, lse, work)
    else:
        _gathered_forward(query, key, value, routes, rest, scale, out, lse, work)
    if skip:
        part = Geometry(skip, skip, block_size, causal)
        tensors = (tensor[:, :, :skip] for tensor in (query, key, value))
        _plain_forward(*tensors, part, scale, out[:, :, :skip], lse[:, :, :skip], work)
    return out, lse


def _tiles_forward(
    by_native: bool, query, key, value, routes, shape: Geometry, scale: float, out, lse, work: Workspace
) -> None:
    """Fill out and lse of a call that is not causal; routes int or bool."""
    count("routed_block_attention", f"torch: {'native' if by_native else 'flash tiles'}")
    if by_native:
        native_path.forward(query, key, value, routes, shape, scale, out, lse)
    else:
        flash_tiles.forward(query, key, value, routes, shape, scale, out, lse, work)


def _gathered_forward(query, key, value, routes, shape: Geometry, scale: float, out, lse, work: Workspace) -> None:
    """Fill out and lse from `shape.skip` on."""
    for b, kv, of_group in _groups(query, key):
        inputs = _prepare(query[b, of_group], key[b, kv], value[b, kv], routes[b, of_group], shape, scale, work)
        result = out[b, of_group].view(-1, out.shape[-1])
        acc = result if out.dtype == lse.dtype else work.take("acc", tuple(result.shape), lse.dtype)
        GatheredGroup(*inputs, shape, work).forward(acc, lse[b, of_group].view(-1))
        if acc is not result:
            result.copy_(acc)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    allow_dense: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; routes are constants. Shapes and options as in `forward`.

    Deterministic; the weights are computed again from lse. Rows that see nothing get zero gradients.
    """
    shape = Geometry(query.shape[2], key.shape[2], block_size, causal)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if not out.numel() or not shape.k_len:
        return tuple(grad.zero_() for grad in grads)
    work = Workspace(query.device)
    by_flash = flash_tiles.can_run_backward(query, key, value, grad_lse, shape)
    if routes.dtype == torch.bool and by_flash and not (allow_dense and bool(routes.all())):
        flash_tiles.backward(grad_out, query, key, value, routes, shape, scale, out, lse, grads, work)
        return grads
    routes = clean_routes(flash_tiles.routes_of(routes) if routes.dtype == torch.bool else routes)
    form, skip = _form(routes, shape, allow_dense)
    if by_flash and form != "dense":
        flash_tiles.backward(grad_out, query, key, value, routes, shape, scale, out, lse, grads, work)
        return grads
    if form == "dense":
        _plain_backward(grad_out, grad_lse, query, key, value, shape, scale, out, lse, grads, work)
        return grads
    rest = replace(shape, skip=skip)
    if form == "masked tiles":
        tiles.backward(grad_out, grad_lse, query, key, value, routes, rest, scale, out, lse, grads, work)
    else:
        _gathered_backward(grad_out, grad_lse, query, key, value, routes, rest, scale, out, lse, grads, work)
    if skip:
        part = Geometry(skip, skip, block_size, causal)
        first = [None if tensor is None else tensor[:, :, :skip] for tensor in (grad_out, grad_lse, query, key, value)]
        sums = tuple(torch.empty_like(tensor, dtype=_computing_type(query)) for tensor in first[2:])
        _plain_backward(*first, part, scale, out[:, :, :skip], lse[:, :, :skip], sums, work)
        for grad, added in zip(grads, sums, strict=True):
            grad[:, :, :skip] += added
    return grads


def _gathered_backward(
    grad_out, grad_lse, query, key, value, routes, shape: Geometry, scale: float, out, lse, grads, work: Workspace
) -> None:
    """Fill grads = (dq, dk, dv) with the share of the rows from `shape.skip` on."""
    dtype = _computing_type(query)
    for b, kv, of_group in _groups(query, key):
        inputs = _prepare(query[b, of_group], key[b, kv], value[b, kv], routes[b, of_group], shape, scale, work)
        grad = _rows(grad_out[b, of_group], dtype)
        terms = _row_terms(
            grad, _rows(out[b, of_group], dtype), lse[b, of_group], None if grad_lse is None else grad_lse[b, of_group]
        )
        sums = [work.take(f"grad{i}", tuple(tensor.shape), dtype) for i, tensor in enumerate(inputs[:3])]
        GatheredGroup(*inputs, shape, work).backward(grad, *terms, *sums)
        grads[0][b, of_group] = sums[0].view(-1, shape.q_len, query.shape[-1])
        grads[1][b, kv] = sums[1].view(-1, key.shape[-1])[: shape.k_len].mul_(scale)
        grads[2][b, kv] = sums[2].view(-1, value.shape[-1])[: shape.k_len]


def _plain_forward(query, key, value, shape: Geometry, scale: float, out, lse, work: Workspace) -> None:
    if dense.can_run(query, key, value, shape):
        dense.forward(query, key, value, shape, scale, out, lse)
    else:
        tiles.forward(query, key, value, None, shape, scale, out, lse, work)


def _plain_backward(
    grad_out, grad_lse, query, key, value, shape: Geometry, scale: float, out, lse, grads, work: Workspace
) -> None:
    if dense.can_run_backward(query, key, value, grad_lse, shape):
        dense.backward(grad_out, query, key, value, shape, scale, out, lse, grads)
    else:
        tiles.backward(grad_out, grad_lse, query, key, value, None, shape, scale, out, lse, grads, work)


def _computing_type(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """(batch entry, key head, the query heads that read it)"""
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for kv in range(key.shape[1]):
            yield b, kv, slice(kv * group, (kv + 1) * group)


def _prepare(query, key, value, routes, shape: Geometry, scale: float, work: Workspace) -> tuple[torch.Tensor, ...]:
    """Inputs of a `GatheredGroup` from [g, Nq, D], [Nk, D], [Nk, Dv], [g, Nq, K]."""
    dtype = _computing_type(query)
    key = _blocks(key, shape, work.take("key", (shape.num_blocks * shape.block_size, key.shape[1]), dtype)).mul_(scale)
    whole = shape.k_len % shape.block_size == 0
    if value.dtype == dtype and value.stride(-1) == 1 and whole:
        value = value.unflatten(0, (-1, shape.block_size))
    else:
        padded = work.take("value", (shape.num_blocks * shape.block_size, value.shape[1]), dtype)
        value = _blocks(value, shape, padded)
    return _rows(query, dtype), key, value, routes.flatten(0, 1)


def _rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[g, N, D] of any strides -> contiguous [g * N, D] of the computing type; no copy where it already is."""
    return tensor.to(dtype).reshape(-1, tensor.shape[-1]).contiguous()


def _blocks(tensor: torch.Tensor, shape: Geometry, padded: torch.Tensor) -> torch.Tensor:
    """[Nk, D] -> [n, block_size, D] in the memory of `padded`, zeros after the last key."""
    padded[: shape.k_len] = tensor
    padded[shape.k_len :] = 0
    return padded.view(-1, shape.block_size, tensor.shape[-1])


def _row_terms(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and delta = sum(grad_out * out) - grad_lse of all rows; +inf and 0 for rows that see nothing."""
    lse = lse.reshape(-1)
    empty = lse == -torch.inf
    delta = torch.linalg.vecdot(grad_out, out)
    if grad_lse is not None:
        delta -= grad_lse.reshape(-1)
    return lse.masked_fill(empty, torch.inf), delta.masked_fill_(empty, 0.0)
