"""head_routed_attention: every token computes only the heads it chose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.ops.backend import autocast, check_qkv, choose_path, may_go_dense, resolve_tokens
from hf_attn.ops.dense import dense_attention
from hf_attn.ops.hfattn_sparse.counters import count


def head_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """Attention of the (head, token) pairs in `heads`; all others cost nothing and give 0 (MoH, arXiv 2410.11842).

    Args:
        query: `[B, Hq, Nq, D]`.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ from `D`.
        heads: bool `[B, Hq, Nq]`, the heads each query token computes.
        causal: query row r sees keys up to `r + Nk - Nq`.
        scale: factor on the scores, default `D ** -0.5`.
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.

    Returns `[B, Hq, Nq, Dv]`; rows that see no key give 0. Differentiable in query, key and value. Unless
    HF_ATTN_BACKEND names a path, full rows are computed densely where that is faster: on CPUs short sequences and,
    unless the compiled kernel takes the call, choices of nearly all heads, on GPUs what needs gradients, and everything
    from Hopper on.

    Raises ValueError for shapes or dtypes that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if heads.shape != query.shape[:3] or heads.dtype != torch.bool:
        raise ValueError(
            f"heads must be a bool tensor [{', '.join(map(str, query.shape[:3]))}] (batch, query heads, tokens), got "
            f"{tuple(heads.shape)} {heads.dtype}"
        )
    path = choose_path("head_routed_attention", query, query.shape[3], value.shape[3])
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    from hf_attn.ops.hfattn_sparse.head_routed import op

    if path == "reference":
        return op.run_reference(query, key, value, heads, index, causal, scale)
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.head_routed.triton_op import head_routed_attention as attend
    else:
        attend = op.head_routed_attention
    if index is None and routes_dense(query, key, value, heads):
        count("head_routed_attention", f"{path}: dense")
        layout = TokenLayout.full(query.shape[0], query.shape[2], key.shape[2])
        return zero_unchosen(dense_attention(AttentionCall(query, key, value, scale, causal, layout)), heads)
    # On CPUs that was decided above, for full rows; what counts as short is counted once.
    decided = index is None and query.device.type == "cpu" and not torch.compiler.is_compiling()
    return attend(query, key, value, heads, index, causal, scale, may_go_dense() and not decided)[0]


def routes_dense(query: Tensor, key: Tensor, value: Tensor, heads: Tensor) -> bool:
    """Whether `head_routed_attention` computes all heads of full rows, because that is as fast.

    Arguments as there. On an H200 two thirds of the heads take 1.3 times cuDNN's time for all, at 8k tokens; the
    backward alone takes three times as long, and longer than that of FlashAttention-2, which older GPUs have.
    """
    from hf_attn.ops.hfattn_sparse.head_routed import torch_path

    if not may_go_dense():
        return False
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if query.device.type == "cuda":
        return trains or (torch.version.hip is None and torch.cuda.get_device_capability(query.device)[0] >= 9)
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # The compiled kernel has no backward, and that takes most of the time.
    with_native = not trains and torch_path.may_take_native(query, key, value)
    return torch_path.prefers_dense(heads, key, with_native)


def zero_unchosen(out: Tensor, heads: Tensor) -> Tensor:
    """out `[B, Hq, Nq, Dv]`, with zeros where `heads` `[B, Hq, Nq]` is False; in place where nothing needs the old out.

    Rows are written whole: to mask elements takes five times as long.
    """
    if out.is_contiguous():
        rows, unchosen = out, ~heads
    else:
        rows, unchosen = out.transpose(1, 2), ~heads.transpose(1, 2)
    if out.device.type != "cpu" or out.requires_grad or torch.compiler.is_compiling() or not rows.is_contiguous():
        return out.masked_fill(~heads[..., None], 0)
    rows.view(-1, out.shape[3]).index_fill_(0, unchosen.flatten().nonzero()[:, 0], 0)
    return out


def choose_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Bool mask of the `top_k` largest entries of the last dimension; of equal ones the first is taken.

    scores: `[..., E]`.
    """
    if scores.device.type == "cpu" and 2048 <= scores.numel() and scores.shape[-1] <= 12:
        return _choose_few(scores.detach(), top_k)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _choose_few(scores: Tensor, top_k: int) -> Tensor:
    """As `choose_top_k`, by all pairs: of few entries those that are beaten by less than `top_k` others.

    Each comparison runs over all tokens at once, which sorting does not.
    """
    entries = scores.movedim(-1, 0).contiguous()
    count = len(entries)
    # wins[i, j] of i < j: entry i is not below entry j, so that it goes first.
    later = torch.ones(count, count, dtype=torch.bool).triu(1).view(count, count, *[1] * (scores.dim() - 1))
    wins = (entries[:, None] >= entries) & later
    beaten = wins.sum(0, dtype=torch.int8) - wins.sum(1, dtype=torch.int8)
    limits = torch.arange(top_k - count + 1, top_k + 1, dtype=torch.int8)
    return (beaten < limits.view(-1, *[1] * (scores.dim() - 1))).movedim(0, -1)


def check_heads(shared: Sequence[int], top_k: int, num_heads: int, *, router: str, name: str = "moh_") -> None:
    """Raise ValueError, naming the field, for shared heads and a `top_k` that do not fit `num_heads` heads."""
    for head in shared:
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < num_heads:
            raise ValueError(f"{name}shared_heads must hold head indices from 0 to {num_heads - 1}, got {head!r}")
    if len(set(shared)) != len(shared):
        raise ValueError(f"{name}shared_heads must not repeat a head, got {list(shared)}")
    routed = num_heads - len(shared)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= routed:
        raise ValueError(
            f"{name}top_k must be an integer from 0 to the {routed} routed heads ({num_heads} heads, {len(shared)} "
            f"shared), got {top_k!r}"
        )
    if not shared and top_k == 0:
        raise ValueError(f"{name}top_k must be >= 1 without shared heads, got 0")
    if router == "query_norm" and routed == 1:
        raise ValueError(
            f"{name}router='query_norm' compares heads, so it needs at least 2 routed heads, got {routed}; share one "
            "head less, or all of them"
        )
