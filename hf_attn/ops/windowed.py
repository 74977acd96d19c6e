"""sink_window_attention: causal attention to the first tokens and a sliding window, exact to the token."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int
from hf_attn.ops.backend import Path, autocast, check_qkv, choose_path, resolve_tokens


def sink_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
    tokens: TokenLayout | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | int | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """A query at position i attends to keys j <= i with j < sinks or j > i - window (StreamingLLM, DuoAttention).

    Args:
        query: `[B, Hq, Nq, D]`; with fewer queries than keys they are the last tokens.
        key, value: `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`; `Hq % Hkv == 0`, `Dv` may differ.
        sinks: first tokens of a sequence that every query sees, >= 0.
        window: most recent tokens a query sees, itself included, >= 1.
        scale: factor on the scores, default `D ** -0.5`.
        tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length: as in `block_sparse_attention`.

    Returns `[B, Hq, Nq, Dv]` in the query's dtype; rows that are not real give 0. Differentiable. Raises ValueError for
    shapes, dtypes or sizes that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    require_int("sinks", sinks, 0)
    require_int("window", window, 1)
    path = choose_path("sink_window_attention", query, query.shape[3], value.shape[3])
    index = resolve_tokens(query, key, tokens, cu_seqlens_q, cu_seqlens_k, key_start, key_length)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)

    return _form(path)(query, key, value, index, sinks, window, scale)


def _form(path: Path) -> Callable[..., Tensor]:
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.windowed.triton_op import sink_window_attention as form

        return form
    from hf_attn.ops.hfattn_sparse.windowed import op

    return op.run_reference if path == "reference" else op.sink_window_attention


def gated_streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
    full: Tensor | None = None,
) -> Tensor:
    """alpha * full + (1 - alpha) * streaming, one gate a KV head: what gates of streaming heads are trained with.

    DuoAttention (arXiv 2410.10819, section 2.2).

    Args:
        query, key, value, sinks, window, scale: as in `sink_window_attention`; causal, as many queries as keys.
        alpha: `[Hkv]`.
        full: `[B, Hq, N, Dv]`, full attention computed before (of the teacher, without gradient); None computes it.

    Returns `[B, Hq, N, Dv]`, differentiable in everything given.

    Raises ValueError for shapes that do not fit, naming the argument.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if alpha.shape != (key.shape[1],):
        raise ValueError(f"alpha must be one gate a KV head, [{key.shape[1]}], got {tuple(alpha.shape)}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"gates need as many queries as keys, got {query.shape[2]} and {key.shape[2]}")
    if full is None:
        gqa = query.shape[1] != key.shape[1]
        full = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    streaming = sink_window_attention(query, key, value, sinks=sinks, window=window, scale=scale)
    gate = alpha.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
    return (gate * full + (1 - gate) * streaming).to(full.dtype)
