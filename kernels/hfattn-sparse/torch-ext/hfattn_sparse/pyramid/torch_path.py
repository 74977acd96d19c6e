"""Pyramid attention in plain PyTorch: a query block gathers its pools of all levels and runs one dense softmax.

No bias is ever added: sums of values already carry the weight w of a pool, so
out = exp(scores) (w V) / (exp(scores) w) takes no pass over the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..block_sparse.tiling import Workspace
from ..block_sparse.torch_forward import NEG_INF, SAFE_LSE, accumulator, stable_exp
from ..counters import count
from . import native_path, torch_half
from .pooling import UNITS, unpool
from .tiles import Pieces, Plan, Tables, Tile, per_head, plan_tiles

# Calls with fewer scores than this stay in fp32, also in half precision: it costs them milliseconds at most.
SMALL = 1 << 21
# Keys whose scores are formed at one time.
PIECE_KEYS = 1024


@torch.no_grad()
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
    """out `[B, Hq, Nq, Dv]` in the query's dtype and lse `[B, Hq, Nq]` in fp32 (fp64); arguments as the reference.

    A row that sees nothing gives 0 and -inf. Keys that a row does not see never reach it, not even as NaN.
    """
    dtype = accumulator(query.dtype)
    if not query.numel() or not key.shape[2]:
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        return out, query.new_full(query.shape[:3], NEG_INF, dtype=dtype)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    offset = key.shape[2] - query.shape[2]
    if _native(query, key, value, levels, block_q, block_k, scale):
        count("pyramid_attention", "torch: native")
        if not native_path.forward(query, key, value, levels, block_q, block_k, causal, scale, tail, out, lse):
            good = out.isfinite().all(-1)
            plan = plan_tiles(levels, query, key, block_q, block_k, causal)
            tables = Tables(key, value, block_k, tail, dtype)
            _recompute(plan, good, query, tables, scale, offset, out, lse)
        return out, lse
    plan = plan_tiles(levels, query, key, block_q, block_k, causal)
    if not plan.complete:
        out.zero_()
    tables = None
    if torch_half.can_fuse(query, key, value, scale) and plan.size * block_k // 8 * block_q > SMALL:
        lse.fill_(NEG_INF)
        torch_half.forward(plan, query, key, value, out, lse, block_k, scale, tail)
        good = out.isfinite().all(-1)
    else:
        tables = Tables(key, value, block_k, tail, dtype)
        _plain_forward(plan, tables, query, out, lse, scale, offset)
        good = lse.abs() <= SAFE_LSE
        if not bool(out.sum().isfinite()):
            good &= out.isfinite().all(-1)
    if not bool(good.all()):
        tables = tables or Tables(key, value, block_k, tail, dtype)
        _recompute(plan, good, query, tables, scale, offset, out, lse)
    return out, lse


def _native(query, key, value, levels: Tensor, block_q: int, block_k: int, scale: float) -> bool:
    """Whether the compiled kernel takes the call: where it is built, unless it is small or its tiles are thin."""
    if native.obstacle(query, key, value, scale) is not None:
        return False
    if native.wanted():
        return True
    if not native.pays(query, value):
        return False
    return block_q >= native_path.FEWEST_ROWS and native_path.scores(levels, block_q, block_k) > SMALL


def _plain_forward(
    plan: Plan, tables: Tables, query: Tensor, out: Tensor, lse: Tensor, scale: float, offset: int
) -> None:
    """Writes out and lse; exponentials as they are: right for rows whose lse comes out within `SAFE_LSE`.

    Until the end lse holds the denominators themselves.
    """
    dtype = tables.keys.dtype
    lse.zero_()
    pieces = Pieces(tables, max(PIECE_KEYS // tables.unit, 1), plan.block_q)
    queries, outs, lses = plan.split(query), plan.split(out), plan.split(lse)
    parts, sums = (query.new_empty(plan.block_q, n, dtype=dtype) for n in (tables.dim, tables.value_dim))
    for row in range(tables.rows):
        tables.load(row)
        for tile in plan.tiles(row):
            own, target, total = queries[tile.number], outs[tile.number], lses[tile.number]
            if own.dtype == dtype:
                part, numerator = own * scale, target  # no copy at the end
            else:
                part, numerator = parts[: len(own)].copy_(own).mul_(scale), sums[: len(own)]
            _plain_tile(part, tables, pieces, tile, tile.hidden(tables.last, offset), numerator, total)
            numerator.div_(total[:, None])
            if numerator is not target:
                target.copy_(numerator)
    lse.log_()


def _plain_tile(
    part: Tensor, tables: Tables, pieces: Pieces, tile: Tile, hidden: Tensor | None, sums: Tensor, total: Tensor
) -> None:
    """Into sums [rows, Dv] the weighted values of everything that the tile reads, into total [rows] their weights."""
    count, unit, start = len(tile.units), tables.unit, 0
    step = -(-count // -(-count // pieces.limit))  # pieces of about one size
    weights = tables.weights.index_select(0, tile.units).view(-1).split(step * unit)
    for units, weight in zip(tile.units.split(step), weights, strict=True):
        piece = pieces.get(len(part), len(units))
        torch.index_select(tables.keys, 0, units, out=piece.key_units)
        torch.mm(part, piece.keys, out=piece.scores).exp_()
        if hidden is not None:
            _on_edge(piece.scores, hidden, start * unit, count * unit)
        torch.index_select(tables.values, 0, units, out=piece.value_units)
        if start:
            sums.addmm_(piece.scores, piece.values)
            total.addmv_(piece.scores, weight)
        else:
            torch.mm(piece.scores, piece.values, out=sums)
            torch.mv(piece.scores, weight, out=total)
        start += step


def _recompute(plan: Plan, good: Tensor, query: Tensor, tables: Tables, scale: float, offset: int, out, lse) -> None:
    """Tiles with a row that is not `good` [B, Hq, Nq], again and carefully, in place."""
    good, query, out, lse = (plan.split(x) for x in (good, query, out, lse))
    work = Workspace()
    for row in range(tables.rows):
        tiles = [tile for tile in plan.tiles(row) if not bool(good[tile.number].all())]
        if tiles:
            tables.load(row)
        for tile in tiles:
            part = query[tile.number].to(tables.keys.dtype) * scale
            result = _careful_tile(part, tables, tile, tile.hidden(tables.last, offset), work)
            out[tile.number].copy_(result[0])
            lse[tile.number].copy_(result[1])


def _on_edge(scores: Tensor, hidden: Tensor, start: int, total: int) -> None:
    """Put 0 where pools are hidden; scores [rows, keys from `start` on], hidden [rows, last keys of all `total`]."""
    first, stop = total - hidden.shape[1], start + scores.shape[1]
    if stop > first:
        part = hidden[:, max(start - first, 0) : stop - first]
        scores[:, scores.shape[1] - part.shape[1] :].masked_fill_(part, 0)


def _careful_tile(part: Tensor, tables: Tables, tile: Tile, hidden: Tensor | None, work: Workspace):
    """The same with the maximum subtracted, and with hidden NaN and infinities kept out."""
    keys, values, weight = tables.gather(tile.units, work)
    scores = (part @ keys.T).masked_fill_(weight == 0, NEG_INF)
    if hidden is not None:
        scores[:, -hidden.shape[1] :].masked_fill_(hidden, NEG_INF)
    top = scores.amax(1, keepdim=True)
    top.masked_fill_(top == NEG_INF, 0)
    weights = stable_exp(scores.sub_(top))
    total = weights @ weight
    broken = ~values.isfinite()
    out = (weights @ values.masked_fill(broken, 0)).div_(total.clamp(min=1e-30)[:, None])
    # A row may only be spoilt by values that it really reads.
    reads = (weights != 0).to(out.dtype) @ broken.to(out.dtype)
    return out.masked_fill_(reads > 0, float("nan")), total.log().add_(top[:, 0])


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes; `out`, `lse` are the results of `forward`."""
    dtype = accumulator(query.dtype)
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    if not query.numel() or not key.shape[2]:
        return grad_query, torch.zeros_like(key), torch.zeros_like(value)
    plan = plan_tiles(levels, query, key, block_q, block_k, causal)
    tables, work, offset = Tables(key, value, block_k, tail, dtype), Workspace(), key.shape[2] - query.shape[2]
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.to(dtype)
    queries, grads, grad_queries, deltas, lses = (plan.split(x) for x in (query, grad_out, grad_query, delta, lse))
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_keys = torch.empty_like(tables.keys)
    grad_values = grad_keys.new_empty(len(grad_keys), block_k // 8 * tables.value_dim)
    owners = zip(per_head(grad_key), per_head(grad_value), strict=True)
    for row, (own_grad_key, own_grad_value) in enumerate(owners):
        tables.load(row)
        careful = not all(bool(x.sum().isfinite()) for x in (tables.keys, tables.values))
        grad_keys.zero_()
        grad_values.zero_()
        for tile in plan.tiles(row):
            part, grad = queries[tile.number].to(dtype) * scale, grads[tile.number].to(dtype)
            pools, hidden = tables.gather(tile.units, work), tile.hidden(tables.last, offset)
            rows = lses[tile.number], deltas[tile.number], hidden
            dq, dk, dv = _tile_gradients(part, grad, *pools, *rows, careful, work)
            grad_queries[tile.number].copy_(dq.mul_(scale))
            grad_keys.index_add_(0, tile.units, dk.view(len(tile.units), -1))
            grad_values.index_add_(0, tile.units, dv.view(len(tile.units), -1))
        own_grad_key.copy_(_to_tokens(grad_keys, key, tables.members, block_k, tail))
        own_grad_value.copy_(_to_tokens(grad_values, value, None, block_k, tail))
    return grad_query, grad_key, grad_value


def _tile_gradients(part, grad, keys, values, weight, lse, delta, hidden, careful: bool, work: Workspace):
    """Gradients of the scaled queries, keys and sums of values of one tile."""
    seen = lse > NEG_INF
    probs = torch.mm(part, keys.T, out=work.get("scores", (len(part), len(keys)), part.dtype, keys.device))
    # Padding has weight 0; its score must not overflow beside a small lse.
    probs.sub_(lse.masked_fill(~seen, 0)[:, None]).masked_fill_(weight == 0, NEG_INF).exp_()
    if hidden is not None:
        probs[:, -hidden.shape[1] :].masked_fill_(hidden, 0)
    if careful:
        unread = ~(probs != 0).any(0)
        keys, values = (x.masked_fill(unread[:, None], 0) for x in (keys, values))
    if not bool(seen.all()):
        probs.masked_fill_(~seen[:, None], 0)
    slope = torch.mm(grad, values.T, out=work.get("slope", probs.shape, part.dtype, keys.device))
    slope.addr_(delta, weight, alpha=-1).mul_(probs)
    if careful or not bool(seen.all()):
        slope.masked_fill_(probs == 0, 0)
    return slope @ keys, slope.T @ part, probs.T @ grad


def _to_tokens(table: Tensor, like: Tensor, members: Tensor | None, block_k: int, tail: str) -> Tensor:
    """The gradient of a table as that of its tokens [N, D], D and N those of `like`."""
    length, dim = like.shape[2:]
    grad = table.view(-1, UNITS * block_k // 8, dim)
    if members is not None:
        grad.div_(members[..., None])
    return unpool(grad, length, block_k, tail)
