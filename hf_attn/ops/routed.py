"""routed_block_attention and its routing: every query token attends to key blocks of its own choice."""

from __future__ import annotations

import math
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int
from hf_attn.ops.backend import Rows, autocast, check_qkv, checks_enabled, choose_path, may_go_dense, resolve_tokens


def select_routes(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """Route every query to the `top_k` key blocks whose mean key it matches best (MoBA, arXiv 2502.13189, eq. 5-8).

    Args:
        query: `[B, Hq, Nq, D]`; key: `[B, Hkv, Nk, D]`.
        block_size: keys per block, >= 1; blocks start at the first real key of a sequence, the last may be partial.
        top_k: blocks per query, >= 1, with `causal` its own block included (always chosen).
        causal: choose among past blocks only.
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.

    Returns:
        int32 `[B, Hq, Nq, min(top_k, ceil(Nk / block_size))]`, ascending block ids, -1 padded. Scores are fp32
        (fp64 for fp64 inputs); on equal scores the later block wins. Not differentiable, as in the paper.

    Raises:
        ValueError: shapes or options that do not fit, naming the argument. With HF_ATTN_CHECK=1 also queries that are
            not the last tokens of their sequence, which the Triton path takes for granted (waits for the device).
    """
    check_qkv(query, key, key)
    path = choose_path("select_routes", query, query.shape[3])
    require_int("block_size", block_size, 1)
    require_int("top_k", top_k, 1)
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)

    if checks_enabled():
        _check_index(index, query, key, causal)

    from hf_attn.ops.hfattn_sparse.routed import op, triton_op

    run = {"reference": op.select_routes_reference, "torch": op.select_routes, "triton": triton_op.select_routes}[path]
    return run(query.detach(), key.detach(), index, block_size, top_k, causal)


@overload
def routed_block_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, *, block_size: int, causal: bool = ..., scale: float
    | None = ..., return_lse: Literal[False] = ..., **rows: Unpack[Rows]
) -> Tensor: ...  # fmt: skip


@overload
def routed_block_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, *, block_size: int, causal: bool = ..., scale: float
    | None = ..., return_lse: Literal[True], **rows: Unpack[Rows]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def routed_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    *,
    block_size: int,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax per query over all tokens of the blocks it is routed to.

    Args:
        query: `[B, Hq, Nq, D]`.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ from `D`.
        routes: int `[B, Hq, Nq, k]`, block ids inside the query's sequence in any order, -1 padded; a repeated id
            counts once, an id beyond the last block is ignored. Or bool `[B, Hq, Nq, ceil(Nk / block_size)]`: whether a
            query reads a block, for numbers of blocks that differ from query to query.
        block_size: keys per block, >= 1.
        causal: query row r sees keys up to `r + Nk - Nq` inside its blocks.
        scale: factor on the scores, default `D ** -0.5`.
        return_lse: also return the log of the softmax denominator, `[B, Hq, Nq]` (fp32; fp64 for fp64 inputs).
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.

    Returns:
        `[B, Hq, Nq, Dv]`; rows that see no key give 0 (lse -inf). Differentiable in query, key, value and through lse.

    Raises:
        ValueError: shapes or options that do not fit, naming the argument. With HF_ATTN_CHECK=1 also routes below -1 or
            beyond the last block of their sequence, and queries that are not the last tokens of theirs (the check waits
            for the device).
    """
    # Under autocast rotary embeddings leave query and key in fp32 beside a bf16 value.
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    path = choose_path("routed_block_attention", query, query.shape[3], value.shape[3])
    require_int("block_size", block_size, 1)
    if routes.dim() != 4 or routes.shape[:3] != query.shape[:3] or routes.is_floating_point():
        raise ValueError(
            f"routes must be an integer tensor [{', '.join(map(str, query.shape[:3]))}, k], or bool, got "
            f"{tuple(routes.shape)} {routes.dtype}"
        )
    blocks = -(-key.shape[2] // block_size)
    if routes.dtype == torch.bool and routes.shape[3] != blocks:
        raise ValueError(f"bool routes must have one column for each of the {blocks} blocks, got {routes.shape[3]}")
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    if path == "triton" and routes.dtype == torch.bool:
        from hf_attn.ops.hfattn_sparse.routed.flash_tiles import routes_of

        routes = routes_of(routes)
    if checks_enabled():
        _check_index(index, query, key, causal)
        if routes.dtype != torch.bool:
            _check_routes(routes, index, key.shape[2], block_size, causal)

    from hf_attn.ops.hfattn_sparse.routed import op, triton_op

    if path == "reference":
        out, lse = op.run_reference(query, key, value, routes, index, block_size, causal, scale)
    else:
        attend = (triton_op if path == "triton" else op).routed_block_attention
        out, lse = attend(query, key, value, routes, index, block_size, causal, scale, may_go_dense())
    return (out, lse) if return_lse else out


def _check_index(index: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> None:
    from hf_attn.ops.hfattn_sparse.device_sequences import check_alignment

    if index is not None:
        check_alignment(index, query.shape[2], key.shape[2], causal)


def _check_routes(routes: Tensor, index: Tensor | None, k_len: int, block_size: int, causal: bool) -> None:
    """Raise ValueError for a route that names no block of its query's sequence."""
    from hf_attn.ops.hfattn_sparse.device_sequences import device_sequences

    q_len = routes.shape[2]
    keys = torch.full((1, q_len), k_len, device=routes.device)
    if index is not None:
        found = device_sequences(index, q_len, k_len, causal)
        keys = torch.zeros_like(found.k_length).scatter_(1, found.q_rows.long(), found.k_length)
    blocks = (keys + block_size - 1) // block_size
    wrong = (routes < -1) | (routes >= blocks[:, None, :, None])
    if index is not None:  # a query that is not real has no blocks, and nothing reads its routes
        wrong &= (index[:, 0, :q_len] >= 0)[:, None, :, None]
    if bool(wrong.any()):
        row, head, query, column = wrong.nonzero()[0].tolist()
        count = int(blocks[row % blocks.shape[0], query])
        raise ValueError(
            f"routes[{row}, {head}, {query}, {column}] is {int(routes[row, head, query, column])}; allowed are -1 "
            f"(none) and the {count} blocks of this query's sequence, 0 to {count - 1}"
        )


def key_block_major(routes: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn routes into the key-block-major layout the kernels walk (FlashMoBA, arXiv 2511.11571, section 4).

    Args:
        routes: int `[B, H, N, k]`, -1 padded.
        num_blocks: key blocks n.

    Returns:
        col_offsets int64 `[B, H, n]`, col_nnz int32 `[B, H, n]` and row_indices int32 `[sum of col_nnz]`: queries that
        chose block i are `row_indices[offset : offset + nnz]`, ascending. An empty segment has offset 0.
    """
    require_int("num_blocks", num_blocks, 0)
    from hf_attn.ops.hfattn_sparse.routed.routing import to_key_block_major

    with torch.no_grad():
        return to_key_block_major(routes, num_blocks)
