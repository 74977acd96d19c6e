"""document_attention and document_scores: prompts of documents that do not see each other (BlockRank)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.ops.backend import Path, autocast, check_qkv, forced_backend


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, *, tokens: TokenLayout, scale: float | None = None
) -> Tensor:
    """Causal attention in which documents see the prefix and themselves, and the reader sees everything.

    BlockRank, arXiv 2510.05396. The work is linear in the number of documents; exact for any lengths and paddings.

    Args:
        query: `[B, Hq, N, D]`.
        key, value: `[B, Hkv, N, D]`, `[B, Hkv, N, Dv]`; `Hq % Hkv == 0`, `Dv` may differ.
        tokens: of `TokenLayout.documents`; queries and keys are the same tokens.
        scale: factor on the scores, default `D ** -0.5`.

    Returns `[B, Hq, N, Dv]` in the query's dtype; rows that are not real give 0. Differentiable; the backward computes
    the forward again. Raises ValueError for shapes, dtypes or a layout that do not fit.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"document_attention needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}; behind a "
            "cache use ops.dense_attention, the new tokens see everything"
        )
    table = _table(tokens, query)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    return _form(_path())(query, key, value, table, scale)


def document_scores(
    query: Tensor, key: Tensor, *, tokens: TokenLayout, rows: Tensor, num_documents: int, scale: float | None = None
) -> Tensor:
    """Attention of single query rows to each document, the softmax taken over document tokens alone.

    BlockRank, equation of the auxiliary loss: prefix and reader keys are left out before the softmax.

    Args:
        query: `[B, Hq, N, D]`; only the chosen rows are read.
        key: `[B, Hkv, N, D]`.
        tokens: of `TokenLayout.documents`, N tokens.
        rows: integer `[B, S]`, slots of the S signal tokens of each row.
        num_documents: N of the result, at least the number of documents of every row, >= 0.
        scale: factor on the scores, default `D ** -0.5`.

    Returns fp32 (fp64 for fp64 inputs) `[B, Hq, S, num_documents]`, each row summing to 1; documents without a token
    get 0, rows without any document are all 0. Differentiable in query and key.

    Raises ValueError for shapes that do not fit, naming the argument.
    """
    table = _table(tokens, query)
    if rows.dim() != 2 or rows.shape[0] != query.shape[0] or rows.is_floating_point():
        raise ValueError(f"rows must be an integer tensor [{query.shape[0]}, signal tokens], got {tuple(rows.shape)}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    heads = key.shape[1]
    picked = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    picked = picked.to(dtype).unflatten(1, (heads, -1))
    logits = (picked @ key.to(dtype).mT[:, :, None] * scale).flatten(1, 2)
    segment, role = table[:, :1, None], table[:, 2:, None]
    real = (segment >= 1) & (role == 1)
    shifted = logits.masked_fill(~real, float("-inf"))
    weights = torch.where(real.any(-1, keepdim=True), shifted, 0).softmax(-1)
    weights = torch.where(real, weights, 0)
    document = torch.where(real, segment - 1, num_documents).long().expand_as(weights)
    out = weights.new_zeros(*weights.shape[:3], num_documents + 1)
    return out.scatter_add(3, document, weights)[..., :num_documents]


def _path() -> Path:
    # Fused attention of torch is the fast path on every device.
    return "reference" if forced_backend() == "reference" else "torch"


def _form(path: Path) -> Callable[..., Tensor]:
    from hf_attn.ops.hfattn_sparse.documents import op

    return op.run_reference if path == "reference" else op.document_attention


def _table(tokens: TokenLayout, query: Tensor) -> Tensor:
    """int32 `[B, 3, N]`: segment, position, role."""
    if not isinstance(tokens, TokenLayout) or tokens.roles is None or tokens.index is None:
        raise ValueError("tokens must be a TokenLayout.documents(segments): it says which token is of which document")
    found, got = (tokens.batch, tokens.k_len), (query.shape[0], query.shape[2])
    if tokens.q_len != tokens.k_len or found != got:
        raise ValueError(f"tokens describes {found} (batch, tokens), the tensors have {got}")
    return torch.cat([tokens.index, tokens.roles[:, None]], 1)[..., tokens.q_len :]
