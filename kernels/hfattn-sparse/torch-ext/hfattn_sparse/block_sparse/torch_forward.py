"""Forward over the chunks of one tile plan: PyTorch's fused CPU attention per tile, or explicit matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiling import BlockTable, Chunk, TilePlan, TileRows, Workspace

NEG_INF = float("-inf")
# exp of anything lower is not worth having, and denormal results cost a CPU up to 100 times a normal one.
FLOOR = -80.0
# Scores are exponentiated as they are: no row maximum, no subtraction. A row whose log-sum-exp stays within this had
# no exponential that overflowed or that was lost although it mattered; any other row is computed again, shifted.
SAFE_LSE = 60.0
# Few large steps: a call costs microseconds however little it does, so chunks may well outgrow a core's own cache.
CHUNK_SCORES, CHUNK_KEYS = 1 << 19, 1 << 14
# A small call takes steps of this share of its scores, and not less than the floor: its scratch memory stays a part of
# what its inputs hold.
CHUNK_SHARE, CHUNK_FLOOR = 1 / 24, 1 << 16
# The fused kernel keeps its scores to itself; larger batches only save calls.
FUSED_KEYS = 1 << 13

_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax statistics and gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score_bound(query: Tensor, key: Tensor, scale: float) -> float:
    """No |score| can be larger than this, by Cauchy-Schwarz; not finite when an input is not."""
    if query.numel() == 0 or key.numel() == 0:
        return 0.0
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x.dtype)).amax().item() for x in (query, key)]
    return abs(scale) * longest[0] * longest[1]


def can_fuse(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> bool:
    """The fused kernel wins for half precision; explicit products win for fp32 and take a bias and any shape."""
    return (
        _fused is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[3] == key.shape[3]
        and key_bias is None
    )


def fused_forward(plan: TilePlan, query: Tensor, keys: BlockTable, values: BlockTable, scale: float, out, lse) -> None:
    """Tiles as the batch of one fused call a chunk. Writes out [B, Hq, rows, D] and lse [B, Hq, rows].

    A mask slows the kernel down on all keys it is given, so blocks that need one are computed apart and merged.
    """
    work, limit = Workspace(), torch.get_num_threads() * FUSED_KEYS
    queries, outs, lses = (TileRows(x, plan) for x in (query, out, lse))
    inner, edge = plan.split_edges()
    for chunk in inner.chunks(limit * plan.tile_rows, limit, query.dtype):
        part, weight = _fused_chunk(chunk, plan, queries, keys, values, scale, work)
        outs.put(chunk, part)
        lses.put(chunk, weight)
    for chunk in edge.chunks(limit * plan.tile_rows, limit, query.dtype):
        part, weight = _fused_chunk(chunk, plan, queries, keys, values, scale, work)
        before = lses.take(chunk, lse.dtype, work, "lse")
        share = torch.sigmoid(weight - before).nan_to_num_(0.0).to(out.dtype)
        outs.put(chunk, torch.lerp(outs.take(chunk, out.dtype, work, "out"), part, share[..., None]))
        lses.put(chunk, torch.logaddexp(before, weight))


def _fused_chunk(chunk: Chunk, plan: TilePlan, queries: TileRows, keys, values, scale: float, work: Workspace):
    """Out [n, tile_rows, D] and lse [n, tile_rows] of a chunk in which all blocks need a mask or none does."""
    dtype = keys.dtype
    query = queries.take(chunk, dtype, work, "query")[:, None]
    key = keys.take(chunk.rows, dtype, work, "key")[:, None]
    value = values.take(chunk.rows, dtype, work, "value")[:, None]
    options: dict = {}
    if chunk.diagonal:
        # The heads of a group get their own rows 0, 1, ... here, else the kernel would count them as one sequence.
        query = query.reshape(len(query), plan.fold, plan.block_rows, -1)
        key, value = (x.expand(-1, plan.fold, -1, -1) for x in (key, value))
        options = {"is_causal": True}
    elif chunk.visible is not None:
        mask = torch.zeros_like(chunk.visible.mT).masked_fill_(chunk.visible.mT == 0, NEG_INF)
        options = {"attn_mask": mask[:, None].expand(len(query), -1, -1, -1)}
    out, lse = _fused(query, key, value, scale=scale, **options)
    lse = lse.reshape(len(query), plan.tile_rows)
    if chunk.visible is not None:  # the kernel says 0 where a row sees nothing
        lse = lse.masked_fill(~chunk.visible.any(1), NEG_INF)
    return out.view(len(query), plan.tile_rows, -1), lse


def explicit_forward(
    plan: TilePlan,
    query: Tensor,
    keys: BlockTable,
    values: BlockTable,
    scale: float,
    bias: tuple[BlockTable, Tensor] | None,
    safe: bool,
    out: Tensor,
    lse: Tensor,
    careful: bool = False,
) -> None:
    """Gather, product, exp, product; any device, dtype and head dimension.

    Args:
        bias: additive key bias as a table, and the first table row of every tile.
        safe: exponentiate scores as they are (see `SAFE_LSE`); only without a bias.
        out, lse: written, [B, Hq, rows, Dv] and [B, Hq, rows].
        careful: keep hidden keys from touching anything even when they hold NaN or infinities.
    """
    work, dtype, threads = Workspace(), accumulator(query.dtype), torch.get_num_threads()
    step = min(max(int(plan.scores * CHUNK_SHARE) // threads, CHUNK_FLOOR), CHUNK_SCORES)
    limit, most_keys = threads * step, threads * CHUNK_KEYS
    queries, outs, lses = (TileRows(x, plan) for x in (query, out, lse))
    # One long row needs no batching: smaller steps stay in the cache.
    longest = max(1, limit // (2 * plan.tile_rows * keys.block))
    for chunk in plan.chunks(limit, most_keys, dtype):
        taken = queries.take(chunk, dtype, work, "query")
        rows = torch.mul(taken, scale, out=work.get("rows", taken.shape, dtype, taken.device))
        total = None
        for piece in chunk.pieces(longest, keys.block):
            name = "part" if total else "total"
            result = _piece(piece, rows, keys, values, bias, safe, careful, work, name)
            if total:
                _merge(total, result)
            total = total or result
        acc, weight, top = total
        # A row that sees anything has far more weight than this bound.
        outs.put(chunk, acc.div_(weight.clamp(min=1e-30)[..., None]))
        logs = weight.log_()
        lses.put(chunk, logs if top is None else logs.add_(top))


def _piece(piece: Chunk, rows: Tensor, keys, values, bias, safe: bool, careful: bool, work: Workspace, name: str):
    """Unnormalised out [n, rows, Dv], weight [n, rows] and subtracted maximum [n, rows] (None = 0) of one piece."""
    value = values.take(piece.rows, rows.dtype, work, "value")
    scores = work.bmm("scores", keys.take(piece.rows, rows.dtype, work, "key"), rows.mT)  # [n, keys, rows]
    top = None
    if safe:
        weights = scores.exp_()
        if piece.edge:
            weights[:, -piece.edge :].mul_(piece.visible)
    else:
        add_bias(scores, piece, bias, work)
        top = scores.amax(1)
        top.masked_fill_(top == NEG_INF, 0)
        weights = stable_exp(scores.sub_(top[:, None]))
    weight = weights.sum(1)
    if not careful:
        return work.bmm(name, weights.mT, value), weight, top
    broken = ~value.isfinite()
    out = work.bmm(name, weights.mT, value.masked_fill(broken, 0))
    # A row may only be spoilt by values that it really reads.
    reads = torch.bmm((weights != 0).to(rows.dtype).mT, broken.to(rows.dtype))
    return out.masked_fill_(reads > 0, float("nan")), weight, top


def add_bias(scores: Tensor, piece: Chunk, bias: tuple[BlockTable, Tensor] | None, work: Workspace) -> None:
    """Add the key bias and hide invisible keys, in place; scores [n, keys, rows]."""
    if bias is not None:
        table, base = bias
        scores += table.take(piece.local + base[piece.at, None], scores.dtype, work, "bias")
    if piece.edge:
        scores[:, -piece.edge :].masked_fill_(piece.visible == 0, NEG_INF)


def stable_exp(shifted: Tensor) -> Tensor:
    """exp in place of scores <= 0, exactly 0 below `FLOOR`."""
    weights = shifted.clamp_(min=FLOOR).exp_()
    return torch.nn.functional.threshold_(weights, 2e-35, 0.0)


def _merge(total, part) -> None:
    """Join another piece of the same rows to `total` in place: (out, weight, maximum or None) each."""
    if total[2] is None:
        total[0].add_(part[0])
        total[1].add_(part[1])
        return
    # A piece without a visible key has weight 0 and the maximum 0, which must not shift the other one away.
    tops = [x[2].masked_fill(x[1] == 0, NEG_INF) for x in (total, part)]
    top = torch.maximum(*tops)
    top.masked_fill_(top == NEG_INF, 0)
    old, new = ((x - top).exp_() for x in tops)
    total[0].mul_(old[..., None]).addcmul_(part[0], new[..., None])
    total[1].mul_(old).addcmul_(part[1], new)
    total[2].copy_(top)
