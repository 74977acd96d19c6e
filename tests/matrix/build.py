"""Calls for the matrix: random tensors, every layout, one way to run a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.mechanism import get_mechanism
from tests.cases import Case


def tensors(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 70,
    k_len: int | None = None,
    dim: int = 12,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key, value `[B, H, N, D]`."""
    generator = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value_dim = dim if value_dim is None else value_dim
    return (
        draw(batch, heads, q_len, dim),
        draw(batch, kv_heads, k_len, dim),
        draw(batch, kv_heads, k_len, value_dim),
    )


def run(
    case: Case, query: Tensor, key: Tensor, value: Tensor, tokens: TokenLayout | None = None, **overrides
) -> Tensor:
    """The mechanism's output `[B, Hq, Nq, Dv]`; `options=` replaces the case's, `scale=` the default scale."""
    return runner(case, overrides.pop("options", None))(query, key, value, tokens, **overrides)


def runner(case: Case, options: dict[str, Any] | None = None) -> Callable[..., Tensor]:
    """`(query, key, value, tokens=None, scale=None) -> out`, with the mechanism looked up beforehand."""
    mechanism = get_mechanism(case.mechanism)
    config = mechanism.config.from_dict(case.options if options is None else options)

    def attend(query, key, value, tokens=None, scale=None):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if tokens is None:
            tokens = TokenLayout.full(query.shape[0], query.shape[2], key.shape[2])
        return mechanism(AttentionCall(query, key, value, scale, True, tokens, LayerContext()), config)

    return attend


def with_gradients(case: Case, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, **kw) -> dict[str, Tensor]:
    """Output and the gradients of sum(out * grad_out)."""
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    out = run(case, *leaves, **kw)
    grads = torch.autograd.grad((out * grad_out.to(out.dtype)).sum(), leaves)
    return {"out": out.detach(), "dq": grads[0], "dk": grads[1], "dv": grads[2]}
