"""selective_attention: every KV head attends only among the tokens it chose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn.ops.backend import Path, autocast, check_qkv, choose_path


def selective_attention(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Selective multi-head attention (Union of Experts, arXiv 2503.02495): an expert is one KV head with its queries.

    Args:
        query: `[B, Hq, N, D]`.
        key, value: `[B, Hkv, N, D]`, `[B, Hkv, N, Dv]`; `Hq % Hkv == 0`, as many tokens as queries.
        selected: bool `[B, Hkv, N]`, the tokens of each KV head. Its queries there see its keys there, in causal
            attention those up to their own.
        scale: factor on the scores, default `D ** -0.5`.

    Returns `[B, Hq, N, Dv]` in the query's dtype; 0 where a head did not choose the token. Differentiable in query, key
    and value. c chosen tokens cost c^2. Raises ValueError for shapes and dtypes that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"selective attention needs as many keys as queries, got {key.shape[2]} and {query.shape[2]}; behind a "
            "cache use ops.dense_attention over the selected keys"
        )
    wanted = (query.shape[0], key.shape[1], key.shape[2])
    if selected.shape != wanted or selected.dtype != torch.bool:
        raise ValueError(
            f"selected must be bool {list(wanted)} (rows, KV heads, tokens), got {selected.dtype} "
            f"{tuple(selected.shape)}"
        )
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    return _form(choose_path("selective_attention", query))(query, key, value, selected, causal, scale)


def _form(path: Path) -> Callable[..., Tensor]:
    from hf_attn.ops.hfattn_sparse.selective import op

    return op.run_reference if path == "reference" else op.selective_attention
