"""grouped_softmax_attention: earlier blocks are entered through their landmark token."""

from __future__ import annotations

import math
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int
from hf_attn.ops.backend import Rows, autocast, check_qkv, choose_path, resolve_tokens


@overload
def grouped_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor | None = ..., *, block_size: int | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., **rows: Unpack[Rows]
) -> Tensor: ...  # fmt: skip


@overload
def grouped_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor | None = ..., *, block_size: int | None = ...,
    scale: float | None = ..., return_lse: Literal[True], **rows: Unpack[Rows]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def grouped_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None = None,
    *,
    block_size: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention whose weight on an earlier block is that of the block's landmark (arXiv 2305.16300, section 3).

    A block is a run of regular tokens and the landmark that ends it. A query's softmax goes over the regular tokens of
    its own block and the landmarks of earlier blocks; the share of a landmark is divided among the regular tokens of
    its block by a softmax of their own. Landmarks themselves get no weight, their values are never read.

    Args:
        query: `[B, Hq, Nq, D]`; with fewer queries than keys they are the last tokens of their sequence.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ from `D`.
        landmarks: bool `[B, Nk]`, which keys are landmarks. A landmark whose block has no regular token is not seen.
        block_size: instead of `landmarks`: every `block_size`-th token of a sequence is one (the landmark included in
            the count), >= 2. The last block may be open.
        scale: factor on the scores, default `D ** -0.5`.
        return_lse: also return the log of the outer softmax's denominator, `[B, Hq, Nq]` (fp32; fp64 for fp64 inputs).
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`. Blocks count from the
            first real token of a sequence.

    Returns:
        `[B, Hq, Nq, Dv]` in the query's dtype; rows that see nothing give 0 (lse -inf). Differentiable in query, key,
        value and through lse. Memory is linear in Nk. Time grows with (number of blocks x longest block), which is Nk
        for landmarks at equal distances.

    Raises:
        ValueError: shapes or options that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if (landmarks is None) == (block_size is None):
        raise ValueError("give either landmarks (bool [B, Nk]) or block_size (every block_size-th token), not both")
    if landmarks is not None:
        shape = (key.shape[0], key.shape[2])
        if landmarks.dtype != torch.bool or tuple(landmarks.shape) != shape:
            raise ValueError(
                f"landmarks must be a bool tensor [B, Nk] = {list(shape)}, got {tuple(landmarks.shape)} "
                f"{landmarks.dtype}"
            )
    else:
        require_int("block_size", block_size, 2)
    path = choose_path("grouped_softmax_attention", query, query.shape[3], value.shape[3])
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.grouped import op

    run = op.run_reference if path == "reference" else op.grouped_softmax_attention
    out, lse = run(query, key, value, landmarks, index, block_size or 0, scale)
    return (out, lse) if return_lse else out
