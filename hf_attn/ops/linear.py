"""linear_attention: causal attention without softmax and with an exponential decay, linear in the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from hf_attn.checks import require_int, require_one_of
from hf_attn.ops.backend import Path, autocast, check_qkv, checks_enabled, choose_path

DEFAULT_BLOCK = 64


@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *, scale: float = ..., initial_state: Tensor | None =
    ..., return_state: Literal[False] = ..., mask: Tensor | None = ..., cu_seqlens: Tensor | None = ..., block_size:
    int = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *, scale: float = ..., initial_state: Tensor | None =
    ..., return_state: Literal[True], mask: Tensor | None = ..., cu_seqlens: Tensor | None = ..., block_size: int =
    ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_size: int = DEFAULT_BLOCK,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """o_t = scale * q_t S_t with S_t = exp(-slope) S_{t-1} + k_t^T v_t, in blocks.

    Lightning Attention-2 (arXiv 2401.04658, algorithms 1 and 2). No softmax and no 1/sqrt(D).

    Args:
        query: `[B, H, N, D]`.
        key, value: `[B, Hkv, N, D]`, `[B, Hkv, N, E]`; `H % Hkv == 0`, fewer heads are repeated (the state is one a
            query head, as the decay is).
        slopes: `[H]`, or `[B, H, N]` for a decay of every token; log-decays >= 0, constants (no gradient).
        scale: factor on the output.
        initial_state: `[B, H, D, E]` (packed: `[sequences, H, D, E]`), S before the first token; default zero.
        return_state: also return the state behind the last token.
        mask: bool or int `[B, N]`, true for real tokens, which may lie anywhere. Other tokens neither decay the state
            nor add to it; their output is that of the unchanged state.
        cu_seqlens: int `[sequences + 1]` from 0 to N with batch 1: sequences end to end, the state restarts at each.
        block_size: tokens whose pairs are computed at a time; the result depends on it by rounding only.
        backend: "auto" is our own paths, or "fla": `chunk_simple_gla` of flash-linear-attention, where it is installed
            and the tensors are on a GPU. It keeps states between its chunks in the inputs' dtype.

    Returns out `[B, H, N, E]` in the query's dtype; with `return_state` also the state, fp32 (fp64 in fp64).
    Differentiable in query, key, value and initial_state. Raises ValueError for shapes, dtypes or options that do not
    fit, naming the argument; values of slopes and cu_seqlens are checked on the CPU and with HF_ATTN_CHECK=1.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    require_int("block_size", block_size, 1)
    batch, heads, length, dim = query.shape
    if key.shape[2] != length:
        raise ValueError(
            f"linear attention needs as many keys as queries, got {key.shape[2]} and {length}; a past is initial_state"
        )
    slopes = _check_slopes(slopes, query)
    rows = _check_packing(cu_seqlens, mask, query)
    if initial_state is not None and initial_state.shape != (rows, heads, dim, value.shape[3]):
        raise ValueError(
            f"initial_state must be [{rows}, {heads}, {dim}, {value.shape[3]}] (rows or sequences, heads, head_dim, "
            f"value dim), got {tuple(initial_state.shape)}"
        )
    if key.shape[1] != heads:
        key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
    if mask is not None:
        real = _check_mask(mask, query)[:, None, :]
        slopes = (slopes[:, None] if slopes.dim() == 1 else slopes) * real
        value = value.masked_fill(~real[..., None], 0)
        key = key.masked_fill(~real[..., None], 0)
    require_one_of("backend", backend, ("auto", "fla"))
    if backend == "fla":
        out, state = _by_fla(query, key, value, slopes, initial_state, cu_seqlens, float(scale))
    else:
        form = _form(choose_path("linear_attention", query, dim, value.shape[3]))
        out, state = form(query, key, value, slopes, initial_state, cu_seqlens, float(scale), block_size)
    return (out, state) if return_state else out


def _form(path: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    from hf_attn.ops.hfattn_sparse.linear import op

    if path == "triton":
        from hf_attn.ops.hfattn_sparse.linear import triton_op

        return triton_op.linear_attention
    return op.run_reference if path == "reference" else op.linear_attention


def _by_fla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's operator for the same function: tokens before heads, gates that are negative slopes.

    Its "lightning" functions are not used: their slopes and scale are other ones than those of trained weights.
    """
    if query.device.type == "cpu":
        raise RuntimeError("backend='fla' needs tensors on a GPU, got 'cpu'; use backend='auto'")
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise RuntimeError(
            "backend='fla' needs flash-linear-attention: pip install flash-linear-attention, or backend='auto'"
        ) from error
    gates = {"g_gamma": -slopes.float()} if slopes.dim() == 1 else {"g": -slopes.float().transpose(1, 2)}
    out, final = chunk_simple_gla(
        *(t.transpose(1, 2) for t in (query, key, value)),
        **gates,
        scale=scale,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return out.transpose(1, 2), final


def _check_slopes(slopes: Tensor, query: Tensor) -> Tensor:
    batch, heads, length, _ = query.shape
    if slopes.dim() == 3:
        fits = slopes.shape == (batch, heads, length)
    else:
        fits = slopes.shape == (heads,)
    if not fits or not slopes.is_floating_point():
        raise ValueError(
            f"slopes must be floating point, [{heads}] (one a head) or [{batch}, {heads}, {length}] (one a token), got "
            f"{slopes.dtype} {tuple(slopes.shape)}"
        )
    slopes = slopes.detach().to(query.device)
    if _may_look(slopes) and slopes.numel():
        lowest, highest = map(float, slopes.aminmax())
        if not (lowest >= 0 and highest < float("inf")):
            raise ValueError(
                f"slopes are log-decays and must be finite and >= 0 (the state is multiplied by exp(-slope)), got "
                f"values from {lowest} to {highest}"
            )
    return slopes


def _check_packing(cu_seqlens: Tensor | None, mask: Tensor | None, query: Tensor) -> int:
    """Number of states: rows, or packed sequences."""
    if cu_seqlens is None:
        return query.shape[0]
    if mask is not None:
        raise ValueError("give mask (padding) or cu_seqlens (packing), not both")
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need batch 1, got query batch {query.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a 1-D integer tensor [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if _may_look(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != query.shape[2] or any(b < a for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to the {query.shape[2]} tokens, got {ends}")
    return cu_seqlens.numel() - 1


def _check_mask(mask: Tensor, query: Tensor) -> Tensor:
    if mask.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"mask must be [{query.shape[0]}, {query.shape[2]}] (1 = real token), got {tuple(mask.shape)}; linear "
            "attention is causal and knows no mask of pairs"
        )
    if mask.is_floating_point():
        raise ValueError(f"mask must be bool or int (1 = real token), got {mask.dtype}")
    return mask.to(query.device).bool()


def _may_look(tensor: Tensor) -> bool:
    """Values are read where that waits for no device, and where the user asked for it."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or checks_enabled()
