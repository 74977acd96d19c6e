"""Decayed linear attention by one Triton kernel, started once forward and three times backward.

Where heads and rows are too few for the device, rows are cut into segments: a first launch finds what each adds to the
state, a second adds these up behind one another, a third does the rest.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launch import config, interpreting, launch
from .triton_kernels import carry_kernel, linear_kernel

# Plain fp32 products hold their operands in registers; wider heads are computed in parts.
WIDEST_FP32 = 128
# Programs that keep a large GPU busy, and the tokens below which a segment is not worth a state.
BUSY = 1024
SHORTEST = 256
# Numbers of a state that one program adds up.
CARRY_BLOCK = 1024


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
    out = query.new_empty(batch, heads, length, value_dim)
    slopes = slopes.float()
    state = None if state is None else state.float()
    width = max(16, triton.next_power_of_2(dim))
    tile = config("linear_attention", dtype=query.dtype, head_dim=width, device=query.device)
    # Few tokens are one short block: a decoding step.
    tile["BLOCK"] = min(tile["BLOCK"], max(16, triton.next_power_of_2(length)))
    tile["TILE"] = min(tile["TILE"], max(16, triton.next_power_of_2(value_dim)))
    rows = batch if borders is None else borders.shape[0] - 1
    columns = -(-value_dim // tile["TILE"])
    segments, span = (1, length) if borders is not None else _segments(length, columns * heads * rows)
    half = query.dtype == torch.float16
    options = {
        "D": dim,
        "DV": value_dim,
        "WIDTH": width,
        "REVERSE": reverse,
        # Sums of a state leave the range of float16: it is computed in fp32 with the products of tf32.
        "PRECISION": "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "UPCAST": half or (interpreting() and query.dtype == torch.bfloat16),
    }
    steps = (0, slopes.stride(0), 0) if slopes.dim() == 1 else slopes.stride()

    def start(out: Tensor | None, initial: Tensor | None, final: Tensor | None) -> None:
        """States are `[rows, heads, segments, D, E]`."""
        launch(
            linear_kernel, (columns, heads, rows * segments),
            query, key, value, slopes, out, initial, final, borders, *query.stride(), *key.stride(), *value.stride(),
            *steps, *((0,) * 5 if initial is None else initial.stride()),
            *((0,) * 3 if final is None else final.stride()[:3]), length, segments, span, scale, **options, **tile,
        )  # fmt: skip

    if segments == 1:
        final = query.new_empty(rows, heads, 1, dim, value_dim, dtype=torch.float32)
        start(out, None if state is None else state[:, :, None], final)
        return out, final[:, :, 0]
    added = query.new_empty(rows, heads, segments + 1, dim, value_dim, dtype=torch.float32)
    added[:, :, 0] = 0 if state is None else state
    start(None, None, added[:, :, 1:])
    totals = _totals(slopes, length, segments, span, reverse)
    size = dim * value_dim
    launch(
        carry_kernel, (-(-size // CARRY_BLOCK), rows * heads),
        added, totals, totals.stride(0) if totals.shape[0] > 1 else 0, totals.stride(1), heads, segments,
        SIZE=size, BLOCK=CARRY_BLOCK, num_warps=4,
    )  # fmt: skip
    start(out, added, None)
    return out, added[:, :, -1]


def _segments(length: int, programs: int) -> tuple[int, int]:
    """How many segments a row has, and their tokens: a multiple of every block size, the last may be shorter."""
    wanted = min(-(-BUSY // max(1, programs)), length // SHORTEST)
    if wanted < 2:
        return 1, length
    span = -(-length // wanted // SHORTEST) * SHORTEST
    return -(-length // span), span


def _totals(slopes: Tensor, length: int, segments: int, span: int, reverse: bool) -> Tensor:
    """fp32 `[B or 1, H, segments]`: what a state decays by over each segment, in the order of the walk."""
    if slopes.dim() == 1:
        first = torch.arange(segments, device=slopes.device) * span
        total = (slopes[:, None] * (length - first).clamp(max=span))[None]
    else:
        padded = torch.nn.functional.pad(slopes, (0, segments * span - length))
        total = padded.unflatten(2, (segments, span)).sum(-1)
    return (total.flip(-1) if reverse else total).contiguous()
