"""Pyramid attention in plain PyTorch: a query block gathers its pools of all levels and runs one dense softmax.

No bias is ever added: sums of values already carry the weight w of a pool, so that
out = exp(scores) (w V) / (exp(scores) w) needs w as one more column of the values, and no pass over the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_sparse.tiling import Workspace
from ..block_sparse.torch_forward import NEG_INF, SAFE_LSE, accumulator, stable_exp
from .pooling import LEVELS, UNITS, last_positions, num_blocks, pool_counts, unpool, write_pools

# Calls with fewer scores than this stay in fp32, also in half precision: it costs them milliseconds at most.
SMALL = 1 << 21
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
# Columns added to values (their weight), and in half precision to keys (a bias in two parts); the rest is alignment.
EXTRA = 8
# Keys whose scores are formed at one time.
PIECE_KEYS = 1024
# Stands for -inf in those columns, whose products must stay finite in fp16.
HIDDEN = -3e4


@dataclass(frozen=True)
class Plan:
    """The tiles (one query block of one head each) of a call and the pools each of them reads.

    units: int64 [total] rows in the table of one (batch, KV head), tile after tile, ascending; starts: where the units
    of every tile begin, [tiles + 1]; edges: how many trailing units of a tile hold pools that some row must not see.
    """

    shape: tuple[int, int, int]
    ratio: int
    block_q: int
    units: Tensor
    starts: list[int]
    edges: list[int]

    def tiles(self) -> Iterator[Tile]:
        """All tiles that read anything."""
        batch, heads, q_len = self.shape
        corners = product(range(batch * heads), range(0, q_len, self.block_q))
        for number, (head, start) in enumerate(corners):
            begin, end = self.starts[number], self.starts[number + 1]
            if begin < end:
                rows = slice(start, min(start + self.block_q, q_len))
                yield Tile(head, rows, head // self.ratio, self.units[begin:end], self.edges[number])


def plan_tiles(levels: Tensor, query: Tensor, key: Tensor, block_q: int, block_k: int, causal: bool) -> Plan:
    """Turn levels into lists of units; a causal plan leaves out units that no row of the tile may see."""
    batch, heads, q_len = query.shape[:3]
    k_len, device = key.shape[2], levels.device
    num_q, num_k = num_blocks(q_len, block_q), num_blocks(k_len, block_k)
    levels = levels[:, :, :num_q, :num_k].expand(batch, heads, num_q, num_k)
    level_of_unit = torch.tensor([level for level in LEVELS for _ in range(8 // level)], device=device)
    chosen = levels[..., None] == level_of_unit  # [B, H, nq, nk, 15]
    edges = torch.zeros(batch * heads * num_q, dtype=torch.int64)
    if causal:
        last = last_positions(k_len, block_k, "exact", device).view(num_k, UNITS, -1)
        first_row = torch.arange(num_q, device=device)[:, None, None] * block_q + (k_len - q_len)
        last_row = (first_row + block_q).clamp(max=k_len) - 1
        chosen = chosen & (last[..., 0] <= last_row)
        # Units are listed block by block: everything from the first block with a hidden pool on counts as edge.
        from_edge = (last_positions(k_len, block_k, "replicate", device)[:, -1] > first_row[..., 0]).cumsum(-1) > 0
        edges = (chosen & from_edge[..., None]).flatten(3).sum(-1).flatten()
    chosen = chosen.flatten(3).flatten(0, 2)
    starts = [0, *chosen.sum(1).cumsum(0).tolist()]
    return Plan((batch, heads, q_len), heads // key.shape[1], block_q, chosen.nonzero()[:, 1], starts, edges.tolist())


class Tables:
    """Keys and weighted values of every (batch, KV head) as rows of units that can be gathered.

    A value row has its weight behind it, so that one product gives the numerator and the denominator of a softmax.
    """

    def __init__(self, key: Tensor, value: Tensor, block_k: int, tail: str, dtype: torch.dtype) -> None:
        batch, heads, k_len, self.dim = key.shape
        self.value_dim = value.shape[3]
        weights, self.members = pool_counts(k_len, block_k, tail, key.device)
        self.last = last_positions(k_len, block_k, tail, key.device).view(-1, block_k // 8)
        pools = (batch, heads, *weights.shape)
        keys = torch.empty(*pools, self.dim, dtype=dtype, device=key.device)
        write_pools(keys, key, block_k, tail, self.members)
        # One more column costs as much as eight.
        self.width = (self.value_dim // EXTRA + 1) * EXTRA
        values = torch.empty(*pools, self.width, dtype=dtype, device=key.device)
        write_pools(values, value, block_k, tail, None)
        values[:, :, -1, :block_k].masked_fill_(weights[-1, :block_k, None] == 0, 0)
        values[..., self.value_dim] = weights.to(dtype)
        values[..., self.value_dim + 1 :] = 0
        self.keys, self.values = (x.view(batch * heads, -1, block_k // 8 * x.shape[-1]) for x in (keys, values))

    def gather(self, tile: Tile, part: slice, work: Workspace) -> tuple[Tensor, Tensor]:
        """Keys [M, D] and weighted values [M, width] of some units of a tile."""
        keys = work.pick("keys", self.keys[tile.table], tile.units[part])
        values = work.pick("values", self.values[tile.table], tile.units[part])
        return keys.view(-1, self.dim), values.view(-1, self.width)


class Tile(NamedTuple):
    """One tile: its head among all [B * Hq], its query rows, the row of its tables, its units and edge units."""

    head: int
    rows: slice
    table: int
    units: Tensor
    edge: int

    def of(self, heads: list[Tensor]) -> Tensor:
        """Its rows of a tensor that `per_head` split."""
        return heads[self.head][self.rows]

    def hidden(self, last: Tensor, offset: int) -> Tensor | None:
        """Bool [rows, edge * u]: pools among the trailing `edge` units that a row must not see; None without edges."""
        if not self.edge:
            return None
        ends = last[self.units[len(self.units) - self.edge :]].flatten()
        position = torch.arange(self.rows.start, self.rows.stop, device=last.device) + offset
        return ends > position[:, None]


def per_head(x: Tensor) -> list[Tensor]:
    """[B, H, N, ...] as B * H views: picking rows of a view costs half of indexing the whole."""
    return [head for row in x.unbind(0) for head in row.unbind(0)]


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
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], NEG_INF, dtype=dtype)
    if not query.numel() or not key.shape[2]:
        return out, lse
    plan = plan_tiles(levels, query, key, block_q, block_k, causal)
    offset = key.shape[2] - query.shape[2]
    if can_fuse(query, key, value, scale) and len(plan.units) * block_k // 8 * block_q > SMALL:
        fused_forward(plan, query, key, value, out, lse, block_k, scale, tail)
        good, tables = out.isfinite().all(-1), None
    else:
        tables, work = Tables(key, value, block_k, tail, dtype), Workspace()
        queries, outs, lses = (per_head(x) for x in (query.to(dtype) * scale, out, lse))
        for tile in plan.tiles():
            hidden = tile.hidden(tables.last, offset)
            _plain_tile(tile.of(queries), tables, tile, hidden, work, tile.of(outs), tile.of(lses))
        good = lse.abs() <= SAFE_LSE
        if not bool(out.sum().isfinite()):
            good &= out.isfinite().all(-1)
    if not bool(good.all()):
        tables = tables or Tables(key, value, block_k, tail, dtype)
        _recompute(plan, good, query, tables, scale, offset, out, lse)
    return out, lse


def _recompute(plan: Plan, good: Tensor, query: Tensor, tables: Tables, scale: float, offset: int, out, lse) -> None:
    """Tiles with a row that is not `good` [B, Hq, Nq], again and carefully, in place."""
    good, query, out, lse = (per_head(x) for x in (good, query, out, lse))
    work = Workspace()
    for tile in plan.tiles():
        if not bool(tile.of(good).all()):
            part = tile.of(query).to(tables.keys.dtype) * scale
            hidden = tile.hidden(tables.last, offset)
            result = _careful_tile(part, tables, tile, hidden, work)
            tile.of(out).copy_(result[0])
            tile.of(lse).copy_(result[1])


def _plain_tile(part: Tensor, tables: Tables, tile: Tile, hidden, work: Workspace, out: Tensor, lse: Tensor) -> None:
    """Writes out [rows, Dv], lse [rows]; exponentials as they are: right when lse comes out within `SAFE_LSE`."""
    rows, unit, dim = len(part), tables.last.shape[1], tables.value_dim
    sums = work.get("sums", (rows, tables.width), part.dtype, part.device)
    for piece in _pieces(len(tile.units), unit):
        keys, values = tables.gather(tile, piece, work)
        scores = torch.mm(part, keys.T, out=work.get("scores", (rows, len(keys)), part.dtype, part.device)).exp_()
        if hidden is not None:
            _on_edge(scores, hidden, piece, len(tile.units) * unit, unit, 0)
        if piece.start:
            sums.addmm_(scores, values)
        else:
            torch.mm(scores, values, out=sums)
    total = sums[:, dim : dim + 1]
    lse.copy_(total[:, 0]).log_()
    numerator = sums[:, :dim]
    if out.dtype == part.dtype:
        torch.div(numerator, total.clamp_(min=1e-30), out=out)
    else:
        out.copy_(numerator.div_(total.clamp_(min=1e-30)))


def _pieces(units: int, unit: int) -> Iterator[slice]:
    """Equal runs of units whose scores stay in a core's own cache."""
    count = -(-units * unit // PIECE_KEYS)
    step = -(-units // count)
    for start in range(0, units, step):
        yield slice(start, min(start + step, units))


def _on_edge(scores: Tensor, hidden: Tensor, piece: slice, total: int, unit: int, fill: float) -> None:
    """Put `fill` where pools are hidden; scores [rows, keys of the piece], hidden [rows, trailing keys of the tile]."""
    first = total - hidden.shape[1]
    start, stop = piece.start * unit, piece.stop * unit
    if stop > first:
        part = hidden[:, max(start - first, 0) : stop - first]
        scores[:, scores.shape[1] - part.shape[1] :].masked_fill_(part, fill)


def _careful_tile(part: Tensor, tables: Tables, tile: Tile, hidden: Tensor | None, work: Workspace):
    """The same with the maximum subtracted, and with hidden NaN and infinities kept out."""
    keys, values = tables.gather(tile, slice(None), work)
    values, weight = values[:, : tables.value_dim], values[:, tables.value_dim]
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
    tables, work = Tables(key, value, block_k, tail, dtype), Workspace()
    careful = not all(bool(x.sum().isfinite()) for x in (tables.keys, tables.values))
    grad_keys = torch.zeros_like(tables.keys)
    grad_values = grad_keys.new_zeros(*grad_keys.shape[:2], block_k // 8 * tables.value_dim)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.to(dtype)
    queries, grads, grad_queries, deltas, lses = (per_head(x) for x in (query, grad_out, grad_query, delta, lse))
    for tile in plan.tiles():
        part, grad = tile.of(queries).to(dtype) * scale, tile.of(grads).to(dtype)
        keys, values = tables.gather(tile, slice(None), work)
        values, weight = values[:, : tables.value_dim], values[:, tables.value_dim]
        hidden = tile.hidden(tables.last, key.shape[2] - query.shape[2])
        seen = tile.of(lses) > NEG_INF
        probs = torch.mm(part, keys.T, out=work.get("scores", (len(part), len(keys)), dtype, keys.device))
        # Padding has weight 0; its score must not overflow beside a small lse.
        probs.sub_(tile.of(lses).masked_fill(~seen, 0)[:, None]).masked_fill_(weight == 0, NEG_INF).exp_()
        if hidden is not None:
            probs[:, -hidden.shape[1] :].masked_fill_(hidden, 0)
        if careful:
            unread = ~(probs != 0).any(0)
            keys, values = (x.masked_fill(unread[:, None], 0) for x in (keys, values))
        if not bool(seen.all()):
            probs.masked_fill_(~seen[:, None], 0)
        grad_values[tile.table].index_add_(0, tile.units, (probs.T @ grad).view(len(tile.units), -1))
        slope = torch.mm(grad, values.T, out=work.get("slope", probs.shape, dtype, keys.device))
        slope.addr_(tile.of(deltas), weight, alpha=-1).mul_(probs)
        if careful or not bool(seen.all()):
            slope.masked_fill_(probs == 0, 0)
        tile.of(grad_queries).copy_((slope @ keys).mul_(scale))
        grad_keys[tile.table].index_add_(0, tile.units, (slope.T @ part).view(len(tile.units), -1))
    return (
        grad_query,
        _to_tokens(grad_keys, key, tables.members, block_k, tail),
        _to_tokens(grad_values, value, None, block_k, tail),
    )


def _to_tokens(table: Tensor, like: Tensor, members: Tensor | None, block_k: int, tail: str) -> Tensor:
    """The gradient of a table as that of its tokens [B, H, N, D], in the dtype of `like`."""
    batch, heads, length, dim = like.shape
    grad = table.view(batch, heads, -1, UNITS * block_k // 8, dim)
    if members is not None:
        grad.div_(members[..., None])
    return unpool(grad, length, block_k, tail).to(like.dtype)


# -- half precision on a CPU -------------------------------------------------------------------------------------------


def can_fuse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether PyTorch's fused CPU attention takes the call: half precision, one head dimension, a positive scale."""
    return (
        _fused is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[3] == key.shape[3]
        and scale > 0
    )


def fused_forward(
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
    tables = []
    for x in (key, value):
        table = torch.empty(*x.shape[:2], *weights.shape, dim + EXTRA, dtype=x.dtype, device=x.device)
        write_pools(table, x, block_k, tail, members)
        table[..., dim:] = 0
        tables.append(table)
    tables[0][..., dim] = first.masked_fill(weights == 0, HIDDEN)
    tables[0][..., dim + 1] = (bias - first).masked_fill(weights == 0, 0).to(key.dtype)
    tables = [x.view(x.shape[0] * x.shape[1], weights.shape[0] * UNITS, -1) for x in tables]
    wide = torch.zeros(*query.shape[:3], dim + EXTRA, dtype=query.dtype, device=query.device)
    wide[..., :dim] = query
    wide[..., dim : dim + 2] = 1
    last = last_positions(k_len, block_k, tail, key.device).view(-1, block_k // 8)
    work = Workspace()
    queries, outs, lses = (per_head(x) for x in (wide, out, lse))
    for tile in plan.tiles():
        keys, values = (
            work.pick(name, table[tile.table], tile.units).view(1, 1, -1, dim + EXTRA)
            for name, table in zip(("keys", "values"), tables, strict=True)
        )
        part = tile.of(queries)[None, None]
        hidden, mask = tile.hidden(last, k_len - query.shape[2]), None
        if hidden is not None:
            mask = torch.zeros(1, 1, part.shape[2], keys.shape[2], dtype=query.dtype)
            mask[0, 0, :, -hidden.shape[1] :].masked_fill_(hidden, NEG_INF)
        result, log = _fused(part, keys, values, attn_mask=mask, scale=scale)
        tile.of(outs).copy_(result[0, 0, :, :dim])
        tile.of(lses).copy_(log.view(-1))
        if hidden is not None:  # the kernel says 0 where a row sees nothing
            tile.of(lses).masked_fill_((mask == NEG_INF).all(-1)[0, 0], NEG_INF)
