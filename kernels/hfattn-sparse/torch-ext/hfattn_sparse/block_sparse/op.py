"""Block-sparse attention as a custom op: sequences are cut out here, one core call computes each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..counters import count
from ..sequences import HOST_SYNC, Sequence, split_sequences, take
from . import reference, torch_path


def run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The reference under plain autograd; arguments as `block_sparse_attention`."""
    count("block_sparse_attention", "reference")
    blocks = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale}
    return _over_sequences(reference.forward, query, key, value, indices, index, key_bias, blocks)


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention"), mutates_args=(), tags=HOST_SYNC)
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        indices: int `[B | sequences | 1, Hq | Hkv | 1, ceil(Nq / block_q), M]`, -1 padded.
        index: token index int32 `[B, 2, Nq + Nk]` (see `sequences.split_sequences`) or None.
        key_bias: fp32 `[B | 1, Hq | Hkv | 1, Nk]` or None.
    """
    count("block_sparse_attention", "torch")
    blocks = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": scale}
    return _over_sequences(torch_path.forward, query, key, value, indices, index, key_bias, blocks)


@block_sparse_attention.register_fake
def _(query, key, value, indices, index, key_bias, block_q, block_k, causal, scale):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=_stat_dtype(query))


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention_backward"), mutates_args=(), tags=HOST_SYNC)
def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    index: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and key_bias (an empty tensor without key_bias)."""
    count("block_sparse_attention_backward", "torch")
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    grad_bias = torch.zeros(0, device=query.device) if key_bias is None else torch.zeros_like(key_bias)
    sequences = split_sequences(index, query.shape[2], key.shape[2], causal)
    for s in sequences:
        picked = _sequence_inputs(s, sequences, query, key, value, indices, key_bias, block_q, block_k)
        dq, dk, dv, dbias = torch_path.backward(
            take(grad_out, s.batch, s.q),
            None if grad_lse is None else take(grad_lse, s.batch, s.q),
            *picked[:4],
            take(out, s.batch, s.q),
            take(lse, s.batch, s.q),
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            scale=scale,
            key_bias=picked[4],
        )
        grads[0][s.batch, :, s.q] = dq.to(query.dtype)
        grads[1][s.batch, :, s.k] = dk.to(key.dtype)
        grads[2][s.batch, :, s.k] = dv.to(value.dtype)
        if dbias is not None:
            # One bias row may serve several batch rows: sum them.
            row = s.batch if key_bias.shape[0] > 1 else slice(None)
            grad_bias[row, :, s.k] += dbias.to(grad_bias.dtype)
    return *grads, grad_bias


@block_sparse_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, indices, index, key_bias, out, lse, block_q, block_k, causal, scale):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    return *grads, (query.new_empty(0, dtype=torch.float32) if key_bias is None else torch.empty_like(key_bias))


def _save_for_backward(ctx, inputs, output):
    query, key, value, indices, index, key_bias, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, indices, index, key_bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, indices, index, key_bias, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dbias = block_sparse_attention_backward(
        grad_out, grad_lse, query, key, value, indices, index, key_bias, out, lse, *ctx.options
    )
    return dq, dk, dv, None, None, (None if key_bias is None else dbias), None, None, None, None


block_sparse_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _over_sequences(core, query, key, value, indices, index, key_bias, blocks) -> tuple[Tensor, Tensor]:
    if index is None:
        return core(query, key, value, indices, key_bias=key_bias, **blocks)
    sequences = split_sequences(index, query.shape[2], key.shape[2], blocks["causal"])
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=_stat_dtype(query))
    for s in sequences:
        picked = _sequence_inputs(
            s, sequences, query, key, value, indices, key_bias, blocks["block_q"], blocks["block_k"]
        )
        out[s.batch, :, s.q], lse[s.batch, :, s.q] = core(*picked[:4], key_bias=picked[4], **blocks)
    return out, lse


def _sequence_inputs(s: Sequence, sequences, query, key, value, indices, key_bias, block_q, block_k):
    q, k, v = take(query, s.batch, s.q), take(key, s.batch, s.k), take(value, s.batch, s.k)
    blocks = _pattern_rows(indices, s, len(sequences), query.shape[0])
    blocks = blocks[:, :, : -(-q.shape[2] // block_q)]
    # A shorter sequence has fewer key blocks than the pattern was made for.
    blocks = torch.where(blocks < -(-k.shape[2] // block_k), blocks, -1)
    bias = None
    if key_bias is not None:
        bias = take(key_bias, s.batch if key_bias.shape[0] > 1 else slice(None), s.k)
    return q, k, v, blocks, bias


def _pattern_rows(indices: Tensor, s: Sequence, num_sequences: int, batch: int) -> Tensor:
    """The pattern of one sequence: shared, one a batch row, or one a sequence."""
    rows = indices.shape[0]
    if rows == 1 or s.batch == slice(None):
        return indices
    # Empty sequences have no number: patterns made for all that a row may hold have rows to spare.
    if rows >= num_sequences and batch == 1:
        return indices[s.number : s.number + 1]
    if rows == batch:
        return indices[s.row : s.row + 1]
    raise ValueError(
        f"the pattern has {rows} rows; allowed are 1, the batch ({batch}), or for one packed row its "
        f"number of sequences ({num_sequences}) or more"
    )


def _stat_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
