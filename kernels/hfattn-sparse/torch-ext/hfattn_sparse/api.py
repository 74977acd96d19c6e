"""The functions of the kernel: arguments by name; the Triton form or the plain torch one, as the tensors allow."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_sparse import op as block_sparse_op
from .linear import op as linear_op
from .paged import op as paged_op
from .paged import selection as page_selection
from .routed import op as routed_op
from .selection import op as selection_op
from .selection.rule import RULES

_GPUS = ("cuda", "xpu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + key_bias) v over the key blocks that `indices` gives each query block.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`.
        indices: int `[B | sequences | 1, Hq | Hkv | 1, ceil(Nq / block_q), M]`, key blocks, -1 padded.
        causal: query row r sees keys up to `r + Nk - Nq`.
        scale: default `D ** -0.5`.
        key_bias: `[B | 1, Hq | Hkv | 1, Nk]`, fp32.
        index: int32 `[B, 2, Nq + Nk]`, queries first: row 0 the sequence of each token (-1: not real), row 1 its
            position. Blocks then count from the first real token of each sequence. None: every row is one sequence.

    Returns:
        out `[B, Hq, Nq, Dv]` and lse `[B, Hq, Nq]`; rows that see nothing give 0 and -inf. Differentiable.
    """
    _check(query, key, value)
    run = _choose(query, value, "block_sparse", "block_sparse_attention_triton", block_sparse_op.block_sparse_attention)
    return run(query, key, value, indices, index, key_bias, block_q, block_k, causal, _scale(query, scale))


def routed_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    *,
    block_size: int,
    causal: bool = True,
    scale: float | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax of every query over the tokens of the key blocks it is routed to: out and lse.

    routes: int `[B, Hq, Nq, k]`, -1 padded, e.g. from `select_routes`; everything else as in `block_sparse_attention`.
    """
    _check(query, key, value)
    run = _choose(query, value, "routed", "routed_block_attention", routed_op.routed_block_attention)
    return run(query, key, value, routes, index, block_size, causal, _scale(query, scale), True)


def select_routes(
    query: Tensor, key: Tensor, *, block_size: int, top_k: int, causal: bool = True, index: Tensor | None = None
) -> Tensor:
    """The `top_k` key blocks whose mean key each query matches best, int32 `[B, Hq, Nq, min(top_k, n)]`, -1 padded."""
    _check(query, key, key)
    run = _choose(query, key, "routed", "select_routes", routed_op.select_routes)
    return run(query, key, index, block_size, top_k, causal)


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    sinks: int = 0,
    local: int = 0,
    causal: bool = True,
    scale: float | None = None,
    index: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """Key blocks of every query block by their means and a rule: the `indices` of `block_sparse_attention`.

    rule: "top_k", "density", "threshold" or "cumulative", of `amount`; sinks, local: blocks that are always kept (see
    `selection.rule.Rule`); sequences: most sequences of a batch row; more than 1 need a batch of one.
    """
    _check(query, key, key)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    run = _choose(query, key, "selection", "select_blocks_triton", selection_op.select_blocks)
    arguments = (block_q, block_k, rule, float(amount), sinks, local, causal, _scale(query, scale), sequences)
    return run(query.detach(), key.detach(), index, *arguments)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """out_t = scale * q_t S_t with S_t = exp(-slope_t) S_{t-1} + k_t^T v_t: out `[B, H, N, E]` and the last state.

    Args:
        query, key, value: `[B, H, N, D]`, `[B, H, N, D]`, `[B, H, N, E]`.
        slopes: log-decays >= 0, `[H]` or `[B, H, N]`; constants.
        initial_state: fp32 `[B | sequences, H, D, E]`.
        cu_seqlens: int `[sequences + 1]` with batch 1: sequences end to end, the state restarts at each.
        block_size: tokens whose pairs the PyTorch form computes at a time.

    Differentiable in query, key, value and initial_state; the state is fp32 (fp64 in fp64).
    """
    _check(query, key, value)
    if key.shape[1] != query.shape[1] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"linear attention needs as many keys as queries, in heads and tokens, got {tuple(query.shape)} and "
            f"{tuple(key.shape)}"
        )
    run = _choose(query, value, "linear", "linear_attention", linear_op.linear_attention)
    return run(query, key, value, slopes.detach(), initial_state, cu_seqlens, float(scale), block_size)


def page_statistics(key: Tensor, *, page_size: int, logical_page_size: int) -> Tensor:
    """Largest and smallest key of every logical page, `[B, H, pages, page_size / logical_page_size, 2, D]`.

    key: `[B, H, N, D]`; pages hold `page_size` tokens, a multiple of `logical_page_size`.
    """
    run = _choose(key, key, "paged", "page_statistics", paged_op.page_statistics)
    return run(key.detach(), page_size, logical_page_size)[0]


def page_scores(query: Tensor, stats: Tensor) -> Tensor:
    """Upper bound of q.k over each page, fp32 `[B, Hq, pages]`; query `[B, Hq, D]`, stats from `page_statistics`."""
    run = _choose(query[:, :, None], query[:, :, None], "paged", "page_scores", paged_op.page_scores)
    return run(query.detach(), stats.detach(), False)


def select_pages(scores: Tensor, last: Tensor, *, count: int) -> Tensor:
    """The `count` best pages before page `last` (int64 `[B]`) of every head, int64 `[B, H, count]`, -1 where fewer."""
    return page_selection.select_pages(scores, last, count)


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Tensor, *, length: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(scale * q.k) v of one query a row over the tokens of the listed pages: `[B, Hq, Dv]`.

    Args:
        query: `[B, Hq, D]`.
        key, value: pages `[B, Hkv, n, P, D]` and `[B, Hkv, n, P, Dv]`.
        pages: int64 `[B, Hkv | Hq, W]`, -1 padded; only these are read.
        length: int64 `[B]`, tokens stored in each row.

    Not differentiable in key and value; rows without a token give 0.
    """
    if query.dim() != 3 or key.dim() != 5 or value.shape[:4] != key.shape[:4] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query must be [B, Hq, D] and key and value pages [B, Hkv, n, P, D] with Hq a multiple of Hkv, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    run = _choose(query[:, :, None], value[:, :, 0], "paged", "paged_attention", paged_op.paged_attention)
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    stored = (key, None, None, None, value, None, None, None)
    with torch.no_grad():
        return run(query, *stored, pages, length, scale, None, None, None, 0, None)


def _choose(query: Tensor, value: Tensor, family: str, name: str, torch_form: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton op of a family on a GPU, where its kernels take the dtype and head dimensions; else the torch form."""
    dims = query.shape[3], value.shape[3]
    if query.device.type not in _GPUS or query.dtype not in _DTYPES or any(d % 8 or not 8 <= d <= 256 for d in dims):
        return torch_form
    return getattr(importlib.import_module(f".{family}.triton_op", __package__), name)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    fits = all(t.dim() == 4 for t in (query, key, value)) and query.shape[0] == key.shape[0]
    fits = fits and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    if not fits or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query, key and value must be [B, Hq, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv] with Hq a multiple of "
            f"Hkv, got {', '.join(map(str, shapes))}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must have one floating-point dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
