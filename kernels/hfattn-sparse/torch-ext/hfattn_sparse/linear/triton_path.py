"""Decayed linear attention by one Triton kernel, started once forward and three times backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launch import config, interpreting, launch
from .triton_kernels import linear_kernel

# Plain fp32 products hold their operands in registers; wider heads are computed in parts.
WIDEST_FP32 = 128


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    borders: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out `[B, H, N, E]` and final state; arguments as in `op.linear_attention`."""
    return _run(query, key, value, slopes, state, borders, scale, reverse=False)


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    borders: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the initial state.

    With G the gradient of the state, dq_t = S_t do_t, dk_t = G_t v_t and dv_t = k_t G_t: the forward recurrence with
    (do, v, k) for (q, k, v), and the reversed one with (v, do, q) and (k, q, do).
    """
    if scale != 1:
        grad_out = grad_out * scale
    turned = None if state is None else state.mT
    grad_query, _ = _run(grad_out, value, key, slopes, turned, borders, 1.0, reverse=False)
    grad_key, _ = _run(value, grad_out, query, slopes, grad_state.mT, borders, 1.0, reverse=True)
    grad_value, grad_initial = _run(key, query, grad_out, slopes, grad_state, borders, 1.0, reverse=True)
    return grad_query, grad_key, grad_value, grad_initial


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    borders: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    value_dim = value.shape[3]
    if query.dtype == torch.float32 and dim > WIDEST_FP32:
        # Outputs are sums over the features of keys, states have a row for each of them.
        parts = [
            _run(
                query[..., s],
                key[..., s],
                value,
                slopes,
                state if state is None else state[:, :, s],
                borders,
                scale,
                reverse,
            )
            for s in (slice(0, WIDEST_FP32), slice(WIDEST_FP32, None))
        ]
        return parts[0][0].add_(parts[1][0]), torch.cat([final for _, final in parts], 2)
    rows = batch if borders is None else borders.shape[0] - 1
    out = query.new_empty(batch, heads, length, value_dim)
    final = query.new_empty(rows, heads, dim, value_dim, dtype=torch.float32)
    slopes = slopes.float()
    steps = (0, slopes.stride(0), 0) if slopes.dim() == 1 else slopes.stride()
    state = None if state is None else state.float()
    width = max(16, triton.next_power_of_2(dim))
    tile = config("linear_attention", dtype=query.dtype, head_dim=width, device=query.device)
    # Few tokens are one short block: a decoding step.
    tile["BLOCK"] = min(tile["BLOCK"], max(16, triton.next_power_of_2(length)))
    tile["TILE"] = min(tile["TILE"], max(16, triton.next_power_of_2(value_dim)))
    half = query.dtype == torch.float16
    launch(
        linear_kernel, (-(-value_dim // tile["TILE"]), heads, rows),
        query, key, value, slopes, out, state, final, borders, *query.stride(), *key.stride(), *value.stride(), *steps,
        *((0,) * 4 if state is None else state.stride()), length, scale,
        D=dim, DV=value_dim, WIDTH=width, REVERSE=reverse,
        # Sums of a state leave the range of float16: it is computed in fp32 with the products of tf32.
        PRECISION="tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=half or (interpreting() and query.dtype == torch.bfloat16), **tile,
    )  # fmt: skip
    return out, final
