"""pyramid_attention and the functions that choose its levels (Pyramid Sparse Attention, arXiv 2512.04025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int, require_one_of
from hf_attn.ops.backend import Rows, autocast, check_qkv, choose_path, resolve_tokens

LEVELS = (1, 2, 4, 8)
MODES = ("threshold", "quantile", "energybound")
ESTIMATORS = ("softmax", "rowmax")
TAILS = ("replicate", "exact")


@overload
def pyramid_attention(
    query: Tensor, key: Tensor, value: Tensor, levels: Tensor, *, block_q: int, block_k: int, causal: bool = ...,
    scale: float | None = ..., tail: str = ..., return_lse: Literal[False] = ..., **rows: Unpack[Rows]
) -> Tensor: ...  # fmt: skip


@overload
def pyramid_attention(
    query: Tensor, key: Tensor, value: Tensor, levels: Tensor, *, block_q: int, block_k: int, causal: bool = ...,
    scale: float | None = ..., tail: str = ..., return_lse: Literal[True], **rows: Unpack[Rows]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    tail: str = "replicate",
    return_lse: bool = False,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax per query over key blocks at full resolution or mean-pooled by 2, 4 or 8, each at its own level.

    A key pooled by r has the additive bias ln(r); `softmax(scale * q.K + ln r) V` with pooled K and V.

    Args:
        query: `[B, Hq, Nq, D]`.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ from `D`.
        levels: uint8 `[B | 1, Hq | 1, ceil(Nq / block_q), ceil(Nk / block_k)]` of 0 (skip), 1, 2, 4 or 8; for packed or
            padded rows the first dimension may count sequences.
        block_q: queries per block, >= 1; block_k: keys per block, a multiple of 8; counted from the first real token.
        causal: query row r sees keys up to `r + Nk - Nq`, and a pooled key when its last member is one of them.
        scale: factor on the scores, default `D ** -0.5`.
        tail: how the partial last block is pooled: filled with its last token ("replicate", as released), or over its
            real tokens with their number as weight ("exact").
        return_lse: also return the log of the softmax denominator, `[B, Hq, Nq]` (fp32; fp64 for fp64 inputs).
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.

    Returns:
        `[B, Hq, Nq, Dv]` in the query's dtype; rows that see no key give 0 (lse -inf). Differentiable in query, key,
        value and through lse; levels are constants. In half precision pooled keys and
        values are rounded to it (not by the reference).

    Raises:
        ValueError: shapes or options that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    path = choose_path("pyramid_attention", query, query.shape[3], value.shape[3])
    check_blocks(block_q, block_k)
    require_one_of("tail", tail, TAILS)
    grid = (-(-query.shape[2] // block_q), -(-key.shape[2] // block_k))
    if levels.dim() != 4 or levels.dtype != torch.uint8 or levels.shape[2:] != grid:
        raise ValueError(
            f"levels must be uint8 [batch, heads, {grid[0]}, {grid[1]}], got {levels.dtype} {tuple(levels.shape)}"
        )
    if levels.shape[1] not in (1, query.shape[1]):
        raise ValueError(f"levels has {levels.shape[1]} heads; allowed: 1 or the query heads ({query.shape[1]})")
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    if index is None and levels.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"levels has {levels.shape[0]} rows; allowed: 1 or the batch ({query.shape[0]})")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.pyramid import op

    run = op.run_reference if path == "reference" else op.pyramid_attention
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.pyramid import triton_op

        run = triton_op.pyramid_attention
    out, lse = run(query, key, value, levels, index, block_q, block_k, causal, scale, tail)
    return (out, lse) if return_lse else out


def select_levels(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    mode: str,
    bounds: Sequence[float],
    causal: bool = False,
    scale: float | None = None,
    estimator: str = "softmax",
    reduce: str = "max",
    stride: int = 8,
    seed: int = 0,
    first_head: int = 0,
    min_full: float = 0.06,
    align_divisor: int = 0,
    similarity: Sequence[float] | None = None,
    density: float | None = None,
    text_spans: Sequence[tuple[int, int]] = (),
    last_text_tokens: int = 0,
    tokens: TokenLayout | None = None,
) -> Tensor:
    """Importance, levels, similarity cap and protection in one call: what `pyramid_attention` reads.

    Args:
        query, key: `[B, Hq, N, D]`, `[B, Hkv, N, D]`.
        block_q, block_k: tokens per block; equal with `causal`.
        mode, bounds, min_full, align_divisor: see `assign_levels`.
        causal: antidiagonal importance, diagonal and first column at level 1, the future skipped; else sampled
            importance.
        estimator, reduce: of `sampled_importance`; stride: of `antidiagonal_importance`.
        seed: of the sampled offsets; the global random state is not touched. `first_head` is the number of the first
            query head in its layer: a head draws the same offsets however heads are spread over processes.
        similarity: thresholds of `similarity_cap`, or None.
        density: scale the bounds so that, in every head, this share of the dense work remains (pooled by r: 1 / r).
        text_spans: `(start, stop)` of tokens that stay at full resolution, as keys for all and as queries to all;
            counted from the first real token, and cut at the last one.
        last_text_tokens: the last `ceil(last_text_tokens / block)` block rows and columns at level 1 (causal).
        tokens: layout of the rows.

    Returns:
        uint8 `[B, Hq, ceil(N / block_q), ceil(N / block_k)]`; with a layout of several sequences one entry a sequence.
        Not differentiable.
    """
    check_qkv(query, key, key)
    check_blocks(block_q, block_k)
    check_rule(mode, bounds, min_full, align_divisor)
    require_one_of("estimator", estimator, ESTIMATORS)
    require_one_of("reduce", reduce, ("max", "mean"))
    if causal:
        check_causal(query, key, block_q, block_k, stride)
    index = resolve_tokens(query, key, tokens, None, None, None, None)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.pyramid import op

    return op.pyramid_levels(
        query.detach(),
        key.detach(),
        index,
        block_q,
        block_k,
        causal,
        scale,
        estimator,
        reduce,
        stride,
        seed,
        first_head,
        mode,
        [float(b) for b in bounds],
        min_full,
        align_divisor,
        None if similarity is None else check_similarity(similarity),
        density,
        [edge for span in text_spans for edge in span],
        -(-last_text_tokens // block_k),
    )


def sampled_importance(
    query: Tensor,
    key: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    estimator: str = "softmax",
    reduce: str = "max",
) -> Tensor:
    """How much each query block needs each key block, from sampled tokens (psa.md 2.3; section 3.2 of the paper).

    Args:
        query, key: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`.
        offsets_q, offsets_k: int `[B, Hq, samples]`, offsets inside a block, the same for all blocks. Past the end of a
            partial last block they read the last token.
        estimator: "softmax", probabilities over all sampled keys (the paper), or "rowmax", exp(score - row maximum)
            (the released kernel; flat with few key blocks).
        reduce: "max" or "mean" over the sampled pairs of two blocks.

    Returns:
        `[B, Hq, nq, nk]`, rows summing to 1, fp32 (fp64 for fp64 inputs). Not differentiable.

    Raises ValueError for offsets that do not fit the blocks.
    """
    check_qkv(query, key, key)
    require_int("block_q", block_q, 1)
    require_int("block_k", block_k, 1)
    require_one_of("estimator", estimator, ESTIMATORS)
    require_one_of("reduce", reduce, ("max", "mean"))
    for name, offsets, block in (("offsets_q", offsets_q, block_q), ("offsets_k", offsets_k, block_k)):
        if offsets.dim() != 3 or offsets.shape[:2] != query.shape[:2] or offsets.is_floating_point():
            raise ValueError(f"{name} must be int [{query.shape[0]}, {query.shape[1]}, samples], got {offsets.shape}")
        if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) < block:
            raise ValueError(f"{name} must lie in 0 to {block - 1}, got {int(offsets.min())} to {int(offsets.max())}")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.pyramid import selection

    options = {"block_q": block_q, "block_k": block_k, "scale": scale, "estimator": estimator, "reduce": reduce}
    with torch.no_grad():
        return selection.sampled_importance(query, key, offsets_q.long(), offsets_k.long(), **options)


def antidiagonal_importance(
    query: Tensor, key: Tensor, *, block: int, stride: int = 8, scale: float | None = None
) -> Tensor:
    """Causal importance of block pairs by strided antidiagonal sums (psa.md 2.6; XAttention, arXiv 2503.16428).

    Args:
        query, key: `[B, Hq, N, D]`, `[B, Hkv, N, D]`.
        block: tokens per block; stride: tokens per group, divides `block`.

    Returns:
        `[B, Hq, n, n]`, 0 above the diagonal, rows not normalised, fp32 (fp64 for fp64 inputs). Not differentiable.
    """
    check_qkv(query, key, key)
    check_causal(query, key, block, block, stride)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.pyramid import selection

    with torch.no_grad():
        return selection.antidiagonal_importance(query, key, block=block, stride=stride, scale=scale)


def assign_levels(
    importance: Tensor,
    *,
    mode: str,
    bounds: Sequence[float],
    min_full: float = 0.06,
    align_divisor: int = 0,
    cap: Tensor | None = None,
    causal: bool = False,
    last_text_blocks: int = 0,
) -> Tensor:
    """Levels from importances, uint8 of the same shape `[B, H, nq, nk]` (psa.md 2.4 and 2.6).

    Blocks are taken by falling importance, earlier ones first on ties; c is the share of the row's sum so far.

    Args:
        mode: "threshold": level r up to and including the block at which c crosses bound r. "energybound": the smallest
            r with 0 < c <= bound r, the crossing block excluded. "quantile": the first `int(n * bound_r)` blocks, n the
            blocks a row may see.
        bounds: four rising numbers in [0, 1], for levels 1, 2, 4, 8; a level with the bound of the one before is empty.
        min_full: "threshold" gives level 1 to at least `int(min_full * n) + 1` blocks.
        align_divisor: round the count of level r to a multiple of `ceil(r / align_divisor)`; 0 = not. (Only a kernel
            that merges pooled blocks into tiles needs it.)
        cap: uint8 `[B, H, nk]` of `similarity_cap`, an upper limit of the level.
        causal: skip blocks above the diagonal, force the diagonal and the first column to level 1.
        last_text_blocks: with `causal`, last block rows and columns at level 1.

    Raises ValueError for importances that are not `[B, H, nq, nk]`, or not square where `causal`.
    """
    check_rule(mode, bounds, min_full, align_divisor)
    if importance.dim() != 4:
        raise ValueError(f"importance must be [batch, heads, nq, nk], got {tuple(importance.shape)}")

    from hf_attn.ops.hfattn_sparse.pyramid import selection

    nq, nk = importance.shape[2:]
    if causal and nq != nk:
        raise ValueError(f"causal levels need as many query as key blocks, got {nq} and {nk}")
    device = importance.device
    visible = torch.ones(nq, nk, dtype=torch.bool, device=device).tril() if causal else None
    full = selection.protected(nq, nk, 1, 1, causal, [], last_text_blocks, device)
    levels = selection.assign_levels(
        importance, list(bounds), mode=mode, min_full=min_full, align_divisor=align_divisor, visible=visible
    )
    return selection.finish(levels, full, None if cap is None else cap[:, :, None], visible)


def similarity_cap(key: Tensor, *, block_k: int, thresholds: Sequence[float]) -> Tensor:
    """Coarsest level that the keys of each block are alike enough for, uint8 `[B, Hkv, ceil(Nk / block_k)]`.

    Args:
        key: `[B, Hkv, Nk, D]`.
        thresholds: for pooling by 2, 4 and 8, in [-1, 1]: the mean cosine of the first and the last token of a pool
            must exceed it. -1 lets (almost) everything pass, 1 forces level 1.
    """
    check_blocks(1, block_k)
    from hf_attn.ops.hfattn_sparse.pyramid import selection

    with torch.no_grad():
        return selection.similarity_cap(key, block_k=block_k, thresholds=check_similarity(thresholds))


def pyramid_pairs(
    levels: Tensor, *, block_q: int, block_k: int, causal: bool, tokens: TokenLayout
) -> tuple[Tensor, Tensor]:
    """(query, key) pairs that levels compute, a key pooled by r counting 1 / r, and that dense attention would.

    Args:
        levels: uint8 `[B | sequences | 1, Hq | 1, nq, nk]` as `pyramid_attention` takes them; a dimension of 1 counts
            once for heads, and once for each row it serves.
        tokens: layout of the rows, as many queries as keys.

    Returns:
        Two fp64 scalars; their ratio is the density.
    """
    from hf_attn.ops.hfattn_sparse.pyramid import op

    return op.count_pairs(levels, tokens.index, tokens.batch, tokens.q_len, tokens.k_len, block_q, block_k, causal)


def check_blocks(block_q: int, block_k: int) -> None:
    """Raise ValueError for block sizes that cannot be pooled."""
    require_int("block_q", block_q, 1)
    require_int("block_k", block_k, 1)
    if block_k % 8:
        raise ValueError(f"block_k must be a multiple of 8 (keys are pooled by 2, 4 and 8), got {block_k}")


def check_rule(mode: str, bounds: Sequence[float], min_full: float, align_divisor: int) -> None:
    """Raise ValueError for a level rule that means nothing."""
    require_one_of("mode", mode, MODES)
    numbers = [b for b in bounds if isinstance(b, int | float) and not isinstance(b, bool) and 0 <= b <= 1]
    if len(bounds) != 4 or len(numbers) != 4 or sorted(bounds) != list(bounds):
        raise ValueError(
            f"bounds must be four rising numbers in [0, 1] for levels 1, 2, 4 and 8, got {list(bounds)}; repeat a "
            "bound to leave a level empty"
        )
    if not 0 <= min_full <= 1:
        raise ValueError(f"min_full must be in [0, 1], got {min_full}")
    require_int("align_divisor", align_divisor, 0)


def check_similarity(thresholds: Sequence[float]) -> list[float]:
    """The thresholds as floats; raises ValueError unless they are three numbers in [-1, 1]."""
    if len(thresholds) != 3 or not all(-1 <= t <= 1 for t in thresholds):
        raise ValueError(f"similarity must be three numbers in [-1, 1] for levels 2, 4 and 8, got {list(thresholds)}")
    return [float(t) for t in thresholds]


def check_causal(query: Tensor, key: Tensor, block_q: int, block_k: int, stride: int) -> None:
    """Raise ValueError for calls whose antidiagonals do not exist.

    query and key are `[B, Hq, Nq, D]` and `[B, Hkv, Nk, D]`.
    """
    require_int("stride", stride, 1)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"causal levels need as many queries as keys, got {query.shape[2]} and {key.shape[2]}; use dense attention "
            "behind a cache"
        )
    if block_q != block_k:
        raise ValueError(f"causal levels need block_q == block_k, got {block_q} and {block_k}")
    if block_k % stride:
        raise ValueError(f"stride must divide the block size, got stride={stride} and block {block_k}")
