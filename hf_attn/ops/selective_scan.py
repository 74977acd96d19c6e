"""selective_scan: Mamba's recurrence, a diagonal state per channel whose step size, input and output maps vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hf_attn.ops.backend import choose_path


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, delta_bias: Tensor | None
    = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ..., return_state: Literal[False] = ..., mask:
    Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, delta_bias: Tensor | None
    = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ..., return_state: Literal[True], mask: Tensor
    | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t;  y_t = <h_t, C_t> + D u_t, for every channel.

    The scan of Mamba (arXiv 2312.00752, algorithm 2). G groups of E channels, each group with a B and C of its own: one
    call does the four directions of an image scan. States, decays and sums are fp32 (fp64 in fp64) whatever the dtype.

    Args:
        u: `[B, G, L, E]`.
        delta: `[B, G, L, E]`, step sizes; >= 0 after `delta_bias` and softplus.
        A: `[G, E, n]`, <= 0 for a state that does not grow; n is the state size.
        B, C: `[B, G, L, n]`.
        D: `[G, E]`, the direct path; default none.
        delta_bias: `[G, E]`, added to delta.
        delta_softplus: apply softplus to delta (after the bias).
        initial_state: `[B, G, E, n]`, h before the first token; default zero.
        return_state: also return h behind the last token.
        mask: bool or int `[B, L]`, true for real tokens, which may lie anywhere. Other tokens leave the state as it is,
            and their y is 0.

    Returns y `[B, G, L, E]` in u's dtype; with `return_state` also the state `[B, G, E, n]`, fp32 (fp64 in fp64).
    Differentiable in every tensor but the mask. Raises ValueError for shapes and dtypes that do not fit, naming the
    argument.
    """
    _check(u, delta, A, B, C)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != A.shape[:2]:
            raise ValueError(f"{name} must be {list(A.shape[:2])} (groups, channels), got {tuple(tensor.shape)}")
    if initial_state is not None and initial_state.shape != (u.shape[0], *A.shape):
        raise ValueError(
            f"initial_state must be {[u.shape[0], *A.shape]} (rows, groups, channels, state size), got "
            f"{tuple(initial_state.shape)}"
        )
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    steps = delta.to(state_dtype)
    if delta_bias is not None:
        steps = steps + delta_bias[:, None].to(state_dtype)
    if delta_softplus:
        steps = softplus(steps)
    if mask is not None:
        real = _check_mask(mask, u)[:, None, :, None]
        steps, u, B, C = (t.masked_fill(~real, 0) for t in (steps, u, B, C))
    y, state = _form(choose_path("selective_scan", u))(u, steps, A, B, C, initial_state)
    if D is not None:
        y = torch.addcmul(y, u, D[:, None].to(u.dtype))
    return (y, state) if return_state else y


def _form(path: str) -> Callable[..., tuple[Tensor, Tensor]]:
    from hf_attn.ops.hfattn_sparse.selective_scan import op

    return op.run_reference if path == "reference" else op.run_torch


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.dim() != 4:
        raise ValueError(f"u must be [batch, groups, tokens, channels], got {tuple(u.shape)}")
    batch, groups, length, channels = u.shape
    if A.dim() != 3 or A.shape[:2] != (groups, channels) or A.shape[2] == 0:
        raise ValueError(f"A must be [{groups}, {channels}, state size] (groups, channels, n), got {tuple(A.shape)}")
    wanted = {"delta": (delta, u.shape), "B": (B, (batch, groups, length, A.shape[2]))}
    wanted["C"] = C, wanted["B"][1]
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit u and A, got {tuple(tensor.shape)}")
    for name, tensor in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_mask(mask: Tensor, u: Tensor) -> Tensor:
    if mask.shape != (u.shape[0], u.shape[2]):
        raise ValueError(f"mask must be [{u.shape[0]}, {u.shape[2]}] (1 = real token), got {tuple(mask.shape)}")
    if mask.is_floating_point():
        raise ValueError(f"mask must be bool or int (1 = real token), got {mask.dtype}")
    return mask.to(u.device).bool()
