"""select_blocks: which key blocks each query block reads, from block means and a rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int
from hf_attn.ops.backend import check_qkv, choose_path, resolve_tokens
from hf_attn.pattern import BlockPattern


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    top_k: int | float | None = None,
    threshold: float | None = None,
    cumulative: float | None = None,
    sinks: int = 0,
    local: int = 0,
    causal: bool = True,
    scale: float | None = None,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
    max_sequences: int | None = None,
) -> BlockPattern:
    """Choose key blocks for every query block by scale * mean(its queries) . mean(keys of a block), in fp32.

    Blocks are put in order: forced ones first, then by score; on equal scores the later block wins. Exactly one rule
    says how much of the beginning is kept; a query block that sees anything keeps at least its best block.

    Args:
        query: `[B, Hq, Nq, D]`; key: `[B, Hkv, Nk, D]`, `Hq % Hkv == 0`; every query head chooses for itself.
        block_q, block_k: tokens per query and key block, >= 1, counted from each sequence's first real token; means
            are taken over real tokens only.
        top_k: an integer >= 1: so many blocks; a float in (0, 1]: this share of the blocks that a query block can see,
            rounded up (taken to a millionth). Forced blocks count.
        threshold: in [0, 1]: blocks whose weight (softmax of the scores over the visible blocks) is at least this.
        cumulative: in (0, 1]: the fewest blocks whose weights sum to at least this ("top-p"). Forced blocks count.
        sinks: the first blocks of a sequence that are always kept, >= 0.
        local: blocks at the diagonal that are always kept: 1: those in which queries of the query block stand, more:
            this many less one before them too (and behind them when not causal), 0: none. With `causal`, 1 or more
            guarantees that every query sees itself.
        causal: choose among blocks that hold a key visible to some query of the query block; the one on the diagonal
            counts with all its keys. Selection looks at whole blocks, so what an early query of a block reads depends
            on later ones of the same block: for prefill, training and bidirectional use, not for decoding.
        scale: factor on the scores, default `D ** -0.5`.
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.
        max_sequences: most sequences of a batch row; only needed with `tokens=` where nothing may wait for the device
            (compiled code, CUDA graphs). Default: found out. More than one need a batch of one.

    Returns:
        A pattern whose indices, int32 `[B, Hq, ceil(Nq / block_q), M]`, have a width M that depends on sizes only: the
        blocks of `top_k` (or the forced ones, where those can be more), else `ceil(Nk / block_k)`. For packed rows
        `[sequences, Hq, ...]`: row i belongs to the i-th sequence that has tokens. Not differentiable.

    Raises:
        ValueError: sizes, rule or layout that do not fit, naming the argument.
    """
    check_qkv(query, key, key)
    path = choose_path("select_blocks", query, query.shape[3])
    require_int("block_q", block_q, 1)
    require_int("block_k", block_k, 1)
    require_int("sinks", sinks, 0)
    require_int("local", local, 0)
    rule, amount = _rule(top_k, threshold, cumulative)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    packed = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
    sequences = _most_sequences(index, query, packed, key_start is None and key_length is None, max_sequences)

    if path == "triton":
        from hf_attn.ops.hfattn_sparse.selection.triton_op import select_blocks_triton as run
    else:
        from hf_attn.ops.hfattn_sparse.selection import op

        run = op.select_blocks_reference if path == "reference" else op.select_blocks
    arguments = (query.detach(), key.detach(), index, block_q, block_k, rule, amount, sinks, local, causal, scale)
    indices = run(*arguments, sequences)
    return BlockPattern(indices, block_q, block_k, query.shape[2], key.shape[2])


def _rule(top_k: int | float | None, threshold: float | None, cumulative: float | None) -> tuple[str, float]:
    """Name and amount of the one rule that is given."""
    rules = {"top_k": top_k, "threshold": threshold, "cumulative": cumulative}
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"select_blocks takes exactly one of top_k, threshold and cumulative, got {', '.join(given) or 'none'}"
        )
    ((name, value),) = given.items()
    if name == "top_k" and not isinstance(value, float):
        require_int("top_k", value, 1)
        return "top_k", float(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and name != "threshold"):
        allowed = "an integer >= 1 or a share in (0, 1]" if name == "top_k" else "a number in (0, 1]"
        allowed = "a number in [0, 1]" if name == "threshold" else allowed
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return "density" if name == "top_k" else name, float(value)


def _most_sequences(
    index: Tensor | None, query: Tensor, packed: Tensor | None, from_tokens: bool, given: int | None
) -> int:
    """Most sequences of a batch row; raises ValueError when one pattern cannot hold them."""
    if given is not None:
        require_int("max_sequences", given, 1)
        found = given
    elif packed is not None:
        found = max(packed.numel() - 1, 1)
    elif index is None or not from_tokens:
        found = 1
    elif torch.compiler.is_compiling() or index.device.type == "meta":
        raise ValueError(
            "select_blocks cannot count the sequences of tokens= in compiled code; pass max_sequences "
            "(1 for padded rows)"
        )
    else:
        ids = index[:, 0, : query.shape[2]].sort(1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids.diff(dim=1) != 0
        found = max(int((new & (ids >= 0)).sum(1).max()), 1) if ids.numel() else 1
    if found > 1 and query.shape[0] > 1:
        raise ValueError(
            f"a pattern has one row a batch row, but batch rows hold up to {found} sequences; got batch "
            f"{query.shape[0]}: call select_blocks once a row"
        )
    return found
