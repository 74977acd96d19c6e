"""Pyramid attention and its levels as custom ops: sequences are cut out here, one core call computes each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, Sequence, split_sequences, take
from . import reference, torch_path
from .pooling import num_blocks
from .selection import choose_levels, cost, pair_counts


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `pyramid_attention`."""
    count("pyramid_attention", "reference")
    options = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale, "tail": tail}
    return over_sequences(reference.forward, query, key, value, levels, index, options)


@torch.library.custom_op(add_op_namespace_prefix("pyramid_attention"), mutates_args=(), tags=HOST_SYNC)
def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        levels: uint8 `[B | sequences | 1, Hq | 1, ceil(Nq / block_q), ceil(Nk / block_k)]`.
        index: token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
        tail: "replicate" or "exact".
    """
    count("pyramid_attention", "torch")
    options = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale, "tail": tail}
    return over_sequences(torch_path.forward, query, key, value, levels, index, options)


@pyramid_attention.register_fake
def _(query, key, value, levels, index, block_q, block_k, causal, scale, tail):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=_stat_dtype(query))


@torch.library.custom_op(add_op_namespace_prefix("pyramid_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def pyramid_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    tail: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the levels are constants."""
    count("pyramid_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    sequences = split_sequences(index, query.shape[2], key.shape[2], causal)
    for s in sequences:
        dq, dk, dv = torch_path.backward(
            take(grad_out, s.batch, s.q),
            None if grad_lse is None else take(grad_lse, s.batch, s.q),
            take(query, s.batch, s.q),
            take(key, s.batch, s.k),
            take(value, s.batch, s.k),
            _levels_of(levels, s, len(sequences), query.shape[0]),
            take(out, s.batch, s.q),
            take(lse, s.batch, s.q),
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            scale=scale,
            tail=tail,
        )
        grads[0][s.batch, :, s.q], grads[1][s.batch, :, s.k], grads[2][s.batch, :, s.k] = dq, dk, dv
    return tuple(grads)


@pyramid_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, levels, index, out, lse, block_q, block_k, causal, scale, tail):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.block_q, ctx.block_k, ctx.causal, ctx.scale, ctx.tail = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, levels, index, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = (ctx.block_q, ctx.block_k, ctx.causal, ctx.scale, ctx.tail)
    grads = pyramid_attention_backward(grad_out, grad_lse, query, key, value, levels, index, out, lse, *options)
    return *grads, *[None] * 7


pyramid_attention.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(add_op_namespace_prefix("pyramid_levels"), mutates_args=(), tags=HOST_SYNC)
def pyramid_levels(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    estimator: str,
    reduce: str,
    stride: int,
    seed: int,
    first_head: int,
    mode: str,
    bounds: list[float],
    min_full: float,
    align_divisor: int,
    similarity: list[float] | None,
    density: float | None,
    text: list[int],
    text_blocks: int,
) -> Tensor:
    """Levels uint8 `[sequences, Hq, nq, nk]` (`[B, ...]` without an index); see `selection.choose_levels`.

    Blocks count from the first token of each sequence; entries beyond its last block are 0.
    """
    count("pyramid_levels", "torch")
    sequences = split_sequences(index, query.shape[2], key.shape[2], causal)
    rows = query.shape[0] if index is None or _one_layout(sequences) else len(sequences)
    shape = (rows, query.shape[1], num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k))
    levels = torch.zeros(shape, dtype=torch.uint8, device=query.device)
    for s in sequences:
        part = choose_levels(
            take(query, s.batch, s.q),
            take(key, s.batch, s.k),
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            scale=scale,
            estimator=estimator,
            reduce=reduce,
            stride=stride,
            seed=seed,
            first_head=first_head,
            mode=mode,
            bounds=bounds,
            min_full=min_full,
            align_divisor=align_divisor,
            similarity=similarity,
            density=density,
            text=text,
            text_blocks=text_blocks,
        )
        row = s.batch if s.batch == slice(None) else slice(s.number, s.number + 1)
        levels[row, :, : part.shape[2], : part.shape[3]] = part
    return levels


@pyramid_levels.register_fake
def _(query, key, index, block_q, block_k, *options):
    rows = query.shape[0] if index is None else torch.library.get_ctx().new_dynamic_size()
    shape = (rows, query.shape[1], num_blocks(query.shape[2], block_q), num_blocks(key.shape[2], block_k))
    return query.new_empty(shape, dtype=torch.uint8)


def count_pairs(
    levels: Tensor, index: Tensor | None, batch: int, q_len: int, k_len: int, block_q: int, block_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Pairs computed under the levels and pairs of dense attention, fp64 scalars; see `ops.pyramid_pairs`."""
    computed, visible = (torch.zeros((), dtype=torch.float64, device=levels.device) for _ in range(2))
    sequences = split_sequences(index, q_len, k_len, causal)
    for s in sequences:
        q, k = (len(range(n)[x]) if isinstance(x, slice) else len(x) for n, x in ((q_len, s.q), (k_len, s.k)))
        pairs = pair_counts(q, k, block_q, block_k, causal, levels.device)
        part = _levels_of(levels, s, len(sequences), batch)[:, :, : pairs.shape[0], : pairs.shape[1]]
        rows = batch if s.batch == slice(None) else 1
        computed += cost(part, pairs).sum() * (rows / part.shape[0])
        visible += pairs.sum() * rows * part.shape[1]
    return computed, visible


def _one_layout(sequences: list[Sequence]) -> bool:
    """Whether all batch rows hold the same single sequence."""
    return len(sequences) == 1 and sequences[0].batch == slice(None)


def over_sequences(core, query, key, value, levels, index, options) -> tuple[Tensor, Tensor]:
    """`core` (a path's `forward`) on every sequence of an index, or once without one."""
    if index is None:
        return core(query, key, value, levels, **options)
    sequences = split_sequences(index, query.shape[2], key.shape[2], options["causal"])
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=_stat_dtype(query))
    for s in sequences:
        q, k, v = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
        part = _levels_of(levels, s, len(sequences), query.shape[0])
        part = part[:, :, : num_blocks(q.shape[2], options["block_q"]), : num_blocks(k.shape[2], options["block_k"])]
        out[s.batch, :, s.q], lse[s.batch, :, s.q] = core(q, k, v, part, **options)
    return out, lse


def _levels_of(levels: Tensor, s: Sequence, num_sequences: int, batch: int) -> Tensor:
    """The levels of one sequence: shared, one entry a sequence, or one a batch row."""
    rows = levels.shape[0]
    if rows == 1 or s.batch == slice(None):
        return levels
    if rows == num_sequences:
        return levels[s.number : s.number + 1]
    if rows == batch:
        return levels[s.row : s.row + 1]
    raise ValueError(
        f"levels has {rows} rows; allowed are 1, the batch ({batch}), or the number of sequences ({num_sequences})"
    )


def _stat_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
