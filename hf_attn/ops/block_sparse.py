"""block_sparse_attention: each query block attends to its own list of key blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.ops.backend import Path, Rows, autocast, check_qkv, choose_path, resolve_tokens
from hf_attn.pattern import BlockPattern


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, *, causal: bool = ..., scale: float | None =
    ..., key_bias: Tensor | None = ..., return_lse: Literal[False] = ..., **rows: Unpack[Rows]
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, *, causal: bool = ..., scale: float | None =
    ..., key_bias: Tensor | None = ..., return_lse: Literal[True], **rows: Unpack[Rows]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + key_bias) v over the key blocks that `pattern` gives each query block.

    Args:
        query: `[B, Hq, Nq, D]`.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0` (grouped-query attention), `Dv` may differ.
        pattern: blocks of each query block, shared by batch rows and heads or not; for packed rows its batch dimension
            may count sequences. Blocks start at the first real token of each sequence.
        causal: query row r sees keys up to `r + Nk - Nq` (bottom-right alignment) inside the selected blocks.
        scale: factor on the scores, default `D ** -0.5`.
        key_bias: `[B | 1, Hq | Hkv | 1, Nk]`, added to the scores of each key; may hold -inf.
        return_lse: also return the log of the softmax denominator, `[B, Hq, Nq]` (fp32; fp64 for fp64 inputs).
        tokens: layout of the rows; or one of the two shorter ways to say it:
        cu_seqlens_q, cu_seqlens_k: int `[sequences + 1]`, packed sequences of a batch of one (one of them is enough
            when queries and keys are the same tokens).
        key_start, key_length: first real key and number of real keys of every row (padding).

    Returns:
        `[B, Hq, Nq, Dv]` in the query's dtype. Rows that see no key, and rows that are not real, give 0 (lse -inf) and
        zero gradients. Differentiable in query, key, value, key_bias, and through lse.

    Raises:
        ValueError: shapes, dtypes or pattern that do not fit, naming the argument. Block ids that do not exist raise on
            the torch path; the Triton path never waits for the device and ignores them, unless the environment variable
            HF_ATTN_CHECK=1 asks it to look (for debugging: also at whether queries are the last tokens of their rows).
    """
    # Under autocast rotary embeddings leave query and key in fp32 beside a bf16 value.
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    path = choose_path("block_sparse_attention", query, query.shape[3], value.shape[3])
    check_pattern(pattern, query, key)
    if key_bias is not None:
        key_bias = _check_key_bias(key_bias, query, key)
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    run = _path(path)
    indices = pattern.indices.to(query.device)
    out, lse = run(query, key, value, indices, index, key_bias, pattern.block_q, pattern.block_k, causal, scale)
    return (out, lse) if return_lse else out


def _path(path: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.block_sparse.triton_op import block_sparse_attention_triton

        return block_sparse_attention_triton
    from hf_attn.ops.hfattn_sparse.block_sparse import op

    return op.run_reference if path == "reference" else op.block_sparse_attention


def check_pattern(pattern: BlockPattern, query: Tensor, key: Tensor) -> None:
    """Raise TypeError or ValueError unless the pattern was made for tensors of these shapes.

    query and key are `[B, Hq, Nq, D]` and `[B, Hkv, Nk, D]`.
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(
            f"pattern must be a hf_attn.pattern.BlockPattern, got {type(pattern).__name__}; "
            "build one with BlockPattern.from_dense or BlockPattern.from_indices"
        )
    if (pattern.q_len, pattern.k_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"pattern was made for {pattern.q_len} queries and {pattern.k_len} keys, but query has {query.shape[2]} "
            f"and key {key.shape[2]}"
        )
    heads = pattern.indices.shape[1]
    if heads not in (1, key.shape[1], query.shape[1]):
        raise ValueError(
            f"pattern has {heads} heads; allowed: 1, the KV heads ({key.shape[1]}) or the query heads "
            f"({query.shape[1]})"
        )


def _check_key_bias(key_bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    batch, k_len = key.shape[0], key.shape[2]
    heads = (1, key.shape[1], query.shape[1])
    fits = key_bias.dim() == 3 and key_bias.shape[0] in (1, batch) and key_bias.shape[1] in heads
    if not fits or key_bias.shape[2] != k_len:
        raise ValueError(
            f"key_bias must be [{batch} or 1, one of {sorted(set(heads))} heads, {k_len}], got {tuple(key_bias.shape)}"
        )
    return key_bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
