"""neural_memory: a small network per head that is trained by gradient descent while the sequence is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.checks import require_int
from hf_attn.ops.backend import checks_enabled, choose_path
from hf_attn.ops.hfattn_sparse.neural_memory import chunk_gated
from hf_attn.ops.hfattn_sparse.neural_memory.chunk_gated import ChunkWeights
from hf_attn.ops.hfattn_sparse.neural_memory.coefficients import Coefficients
from hf_attn.ops.hfattn_sparse.neural_memory.coefficients import coefficients as _coefficients
from hf_attn.ops.hfattn_sparse.neural_memory.network import read as _read

DEFAULT_CHUNK = 64


class MemoryStates(NamedTuple):
    """What `neural_memory` needs to go on: L tensors `[B, H, in, out]` of each kind, fp32 (fp64 in fp64).

    `chunk_start_weights` are those at the start of the chunk that contains the last token, also when that token ends
    the chunk; `chunk_offset` counts the tokens read of the running grid of chunks (one number, or int64 `[B]`).
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    chunk_start_weights: tuple[Tensor, ...]
    chunk_offset: int | Tensor


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    *,
    momentum: Sequence[Tensor] | None = None,
    chunk_size: int = DEFAULT_CHUNK,
    chunk_start_weights: Sequence[Tensor] | None = None,
    chunk_offset: int | Tensor = 0,
    read_before_write: bool = False,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    loss_reduction: str = "sum",
    max_inner_grad_norm: float | None = None,
) -> Tensor | tuple[Tensor, MemoryStates]:
    """Reads `query` from a network M_W that every (key, value) before it has trained (Titans, arXiv 2501.00663).

    With u_t the gradient of ||M_W(k_t) - v_t||^2 at the weights of the start of t's chunk (eq. 8 to 18):
    S_t = eta_t S_{t-1} - theta_t u_t, W_t = (1 - alpha_t) W_{t-1} + S_t, y_t = M_{W_t}(q_t). M_W is a chain of L
    matrices with exact GELU between them. Chunks of 1 are the exact recurrence; larger ones are the paper's
    approximation, computed in parallel, and a different function.

    Args:
        query, key, value: `[B, H, T, d]`.
        theta, eta, alpha: `[B, H, T]`, step size >= 0, momentum and forgetting in [0, 1].
        weights: W before the first token, L >= 1 matrices `[H, in, out]` or `[B, H, in, out]` from d to d.
        momentum: S before the first token, `[B, H, in, out]`; default 0.
        chunk_size: tokens whose gradients are taken at the same weights, >= 1.
        chunk_start_weights, chunk_offset: of the chunk that the first token continues; from `MemoryStates`.
            `chunk_offset` may be int64 `[B]`, one number a row.
        read_before_write: y_t = M_{W_{t-1}}(q_t).
        output_final_state: also return `MemoryStates`.
        mask: bool or int `[B, T]`, true for real tokens, which may lie anywhere. Others change nothing and count for
            no chunk; their output is 0.
        loss_reduction: "sum" over features, or their "mean".
        max_inner_grad_norm: scales down the gradients of tokens above this norm (over all layers); default off.

    Returns y `[B, H, T, d]` in the query's dtype. Weights and momentum are fp32 (fp64 in fp64), also under autocast.
    Differentiable in every tensor, through the inner gradient. Raises ValueError for what does not fit, naming the
    argument; values of gates are checked with HF_ATTN_CHECK=1.
    """
    check_memory(query, key, value, (theta, eta, alpha), weights)
    require_int("chunk_size", chunk_size, 1)
    if loss_reduction not in ("sum", "mean"):
        raise ValueError(f"loss_reduction must be 'sum' or 'mean', got {loss_reduction!r}")
    if max_inner_grad_norm is not None and not max_inner_grad_norm > 0:
        raise ValueError(f"max_inner_grad_norm must be positive or None, got {max_inner_grad_norm!r}")
    offset = _check_offset(chunk_offset, query, chunk_start_weights, chunk_size)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if mask is not None:
        mask = _check_mask(mask, query)
    with torch.autocast(query.device.type, enabled=False):
        start = _states("weights", weights, query, exact)
        states = (
            start,
            [torch.zeros_like(w) for w in start]
            if momentum is None
            else _states("momentum", momentum, query, exact, like=start),
            start
            if chunk_start_weights is None
            else _states("chunk_start_weights", chunk_start_weights, query, exact, like=start),
        )
        form = _form(choose_path("neural_memory", query))
        out, *states = form(
            *(t.to(exact) for t in (query, key, value)),
            tuple(t.to(exact) for t in (theta, eta, alpha)),
            states,
            offset,
            chunk_size,
            mask,
            read_before_write,
            mean_loss=loss_reduction == "mean",
            max_norm=max_inner_grad_norm,
        )
    out = out.to(query.dtype)
    if not output_final_state:
        return out
    passed = query.shape[2] if mask is None else mask.sum(1)
    after, momenta, chunk_start = (tuple(kind) for kind in states)
    return out, MemoryStates(after, momenta, chunk_start, offset + passed)


def read_memory(query: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """M_W(q) without any update: query `[B, H, T, d]`, weights `[H, in, out]` or `[B, H, in, out]`; fp32 inside."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        return _read(query.to(exact), [w.to(exact) for w in weights]).to(query.dtype)


def memory_coefficients(theta: Tensor, eta: Tensor, alpha: Tensor, *, mask: Tensor | None = None) -> Coefficients:
    """beta, m, f `[..., m]` and N, G `[..., m, m]` of one chunk of m tokens, from its gates `[..., m]`.

    W_t = beta_t W + f_t S - sum_s G[t, s] u_s and S_t = m_t S - sum_s N[t, s] u_s, where W and S are the weights and
    the momentum before the chunk, and u_s the gradient of token s. `mask` is bool `[..., m]`, true for written tokens.
    """
    return _coefficients(theta, eta, alpha, mask)


def chunk_gated_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    *,
    chunk_size: int,
    gradient_anchor: int | None = None,
    loss_reduction: str = "mean",
    memory_residual_norm: bool = True,
) -> tuple[Tensor, ChunkWeights]:
    """The memory that titans-pytorch computes: another function than `neural_memory`, for weights trained with it.

    Momentum and forgetting are one a chunk, gradients of a chunk are summed, and token t is read with the weights
    behind floor((t + 1) / chunk_size) complete chunks. Momentum begins at 0.

    Args:
        query, key, value: `[B, H, T, d]`.
        theta: `[B, H, T]`; eta, alpha: `[B, H, floor(T / chunk_size)]`, of the complete chunks.
        weights: matrices `[H, in, out]` or `[B, H, in, out]` and, with `memory_residual_norm`, gamma `[H, d]` or
            `[B, H, d]` last.
        gradient_anchor: tokens between the weights at which gradients are taken, a multiple of `chunk_size`; None takes
            all of them at the initial weights.
        loss_reduction: "mean" over features, or their "sum".
        memory_residual_norm: M(x) = x + LayerNorm(MLP(x)) * (1 + gamma) instead of MLP(x); gamma is learned as well.

    Returns the output `[B, H, T, d]` and the weights of all chunks with the last momentum, fp32 (fp64 in fp64).

    Raises ValueError for shapes and options that do not fit, naming the argument.
    """
    require_int("chunk_size", chunk_size, 1)
    if loss_reduction not in ("sum", "mean"):
        raise ValueError(f"loss_reduction must be 'sum' or 'mean', got {loss_reduction!r}")
    if gradient_anchor is not None and (gradient_anchor < 1 or gradient_anchor % chunk_size):
        raise ValueError(f"gradient_anchor={gradient_anchor} must be a multiple of chunk_size={chunk_size}")
    batch, heads, length, width = query.shape
    count = length // chunk_size
    for name, gate, steps in (("theta", theta, length), ("eta", eta, count), ("alpha", alpha, count)):
        if gate.shape != (batch, heads, steps):
            raise ValueError(f"{name} must be [{batch}, {heads}, {steps}], got {list(gate.shape)}")
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    matrices = len(weights) - memory_residual_norm
    if matrices < 1:
        raise ValueError(f"weights holds {len(weights)} tensors; at least one matrix is needed besides gamma")
    with torch.autocast(query.device.type, enabled=False):
        start = [
            w.to(exact).expand(batch, heads, *w.shape[-2 if index < matrices else -1 :])
            for index, w in enumerate(weights)
        ]
        tokens = (t.to(exact) for t in (query, key, value, theta, eta, alpha))
        out, states = chunk_gated.forward(
            *tokens,
            start,
            chunk=chunk_size,
            anchor=gradient_anchor,
            residual_norm=memory_residual_norm,
            mean_loss=loss_reduction == "mean",
        )
    return out.to(query.dtype), states


def _form(path: str):
    from hf_attn.ops.hfattn_sparse.neural_memory import op

    return op.run_reference if path == "reference" else op.run


def check_memory(
    query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> None:
    """Raise ValueError unless tokens, gates and weights fit together.

    Tokens are `[B, H, T, d]`, gates `[B, H, T]`, weights `[H, in, out]` or `[B, H, in, out]`.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.shape != query.shape:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, head_dim] as the query {tuple(query.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    for name, gate in zip(("theta", "eta", "alpha"), gates, strict=True):
        if gate.shape != query.shape[:3]:
            raise ValueError(
                f"{name} must be [batch, heads, tokens] = {list(query.shape[:3])}, got {list(gate.shape)}; expand a "
                "gate that several tokens or heads share"
            )
        if checks_enabled() and gate.numel():
            low, high = float(gate.min()), float(gate.max())
            if not (low >= 0 and (high <= 1 or name == "theta")):
                allowed = ">= 0" if name == "theta" else "in [0, 1]"
                raise ValueError(f"{name} must be {allowed}, got values from {low:.4g} to {high:.4g}")
    if len(weights) < 1:
        raise ValueError("weights must hold at least one matrix (depth >= 1), got none")
    width = query.shape[3]
    for index, weight in enumerate(weights):
        heads = weight.shape[0] if weight.dim() == 3 else weight.shape[1] if weight.dim() == 4 else None
        if heads != query.shape[1] or weight.shape[-2] != width:
            raise ValueError(
                f"weights[{index}] must be [heads, in, out] or [batch, heads, in, out] with {query.shape[1]} heads "
                f"and in = {width}, got {tuple(weight.shape)}"
            )
        width = weight.shape[-1]
    if width != query.shape[3]:
        raise ValueError(f"the last of weights must lead back to head_dim {query.shape[3]}, it leads to {width}")


def _states(
    name: str, given: Sequence[Tensor], query: Tensor, dtype: torch.dtype, like: list[Tensor] | None = None
) -> list[Tensor]:
    """The matrices as `[B, H, in, out]` in `dtype`."""
    if like is not None and len(given) != len(like):
        raise ValueError(f"{name} has {len(given)} matrices, weights has {len(like)}")
    shape = (query.shape[0], query.shape[1])
    found = []
    for index, tensor in enumerate(given):
        if (
            tensor.dim() == 4
            and tensor.shape[0] != query.shape[0]
            or like
            and tensor.shape[-3:] != like[index].shape[1:]
        ):
            raise ValueError(
                f"{name}[{index}] is {tuple(tensor.shape)}, which is of another batch or network than this call: "
                f"{(*shape, *tensor.shape[-2:]) if like is None else tuple(like[index].shape)} is needed"
            )
        found.append(tensor.to(dtype).expand(*shape, *tensor.shape[-2:]))
    return found


def _check_offset(
    offset: int | Tensor, query: Tensor, anchor: Sequence[Tensor] | None, chunk_size: int
) -> int | Tensor:
    if isinstance(offset, Tensor):
        if offset.shape != query.shape[:1] or offset.is_floating_point():
            raise ValueError(f"chunk_offset must be an integer or int64 [{query.shape[0]}], got {tuple(offset.shape)}")
        return offset.to(query.device)
    require_int("chunk_offset", offset, 0)
    if offset % chunk_size and anchor is None:
        raise ValueError(
            f"chunk_offset={offset} continues a chunk of {chunk_size}; pass its chunk_start_weights, as returned with "
            "output_final_state=True"
        )
    return offset


def _check_mask(mask: Tensor, query: Tensor) -> Tensor:
    if mask.shape != (query.shape[0], query.shape[2]) or mask.is_floating_point():
        raise ValueError(
            f"mask must be bool or int [{query.shape[0]}, {query.shape[2]}] (1 = real token), got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return mask.to(query.device).bool()
