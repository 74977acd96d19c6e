"""neighborhood_attention on grids of one, two or three axes, and its two products apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from hf_attn.checks import require_one_of
from hf_attn.ops.backend import Path, autocast, choose_path, triton_obstacle
from hf_attn.ops.neighborhood_arguments import (
    Flags,
    Geometry,
    Sizes,
    check_grid,
    check_heads_first,
    check_rpb,
    geometry_of,
    with_extra,
)

_BACKENDS = ("auto", "reference", "torch", "triton", "flex", "natten")


@overload
def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, *, kernel_size: Sizes, dilation: Sizes = ..., stride: Sizes = ...,
    is_causal: Flags = ..., rpb: Tensor | None = ..., scale: float | None = ..., additional_keys: Tensor | None =
    ..., additional_values: Tensor | None = ..., key_mask: Tensor | None = ..., additional_key_mask: Tensor | None =
    ..., return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, *, kernel_size: Sizes, dilation: Sizes = ..., stride: Sizes = ...,
    is_causal: Flags = ..., rpb: Tensor | None = ..., scale: float | None = ..., additional_keys: Tensor | None =
    ..., additional_values: Tensor | None = ..., key_mask: Tensor | None = ..., additional_key_mask: Tensor | None =
    ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    stride: Sizes = 1,
    is_causal: Flags = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_key_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Every query attends to the `prod(kernel_size)` keys around it (NA, arXiv 2204.07143; FNA, arXiv 2403.04690).

    Windows are moved inward at borders, never cut or padded. With a dilation they count every d-th token, with a stride
    a run of queries shares one window (arXiv 2504.16922); a causal axis sees no key after the query. All axes must
    agree that a key is seen.

    Args:
        query: `[B, *space, Hq, D]`, space of one to three axes (the tensor says how many).
        key, value: `[B, *space, Hkv, D]`, `[B, *space, Hkv, Dv]`; `Hq % Hkv == 0`, `Dv` may differ from `D`.
        kernel_size: keys along each axis, >= 2; `kernel_size * dilation` must not exceed the axis. Even windows have
            one key more before the query than behind it.
        dilation: >= 1. stride: 1 to `kernel_size`; the kernel size gives blocks as in Swin.
        is_causal: of each axis.
        rpb: `[Hq, 2 K - 1, ...]`, bias by relative position, added to the scaled scores; needs odd kernels, stride 1
            and no causal axis.
        scale: factor on the scores, default `D ** -0.5`.
        additional_keys, additional_values: `[B, M, Hkv, D]`, `[B, M, Hkv, Dv]`, keys off the grid (text, registers)
            that every query sees, in the same softmax.
        key_mask: bool `[B, *space]`, False hides a key (padding); queries there are computed all the same.
        additional_key_mask: bool `[B, M]`, the same for additional keys.
        return_lse: also return the logarithm of the softmax denominator, `[B, *space, Hq]`, fp32 (fp64 for fp64).
        backend: "auto" (HF_ATTN_BACKEND, else the fastest for the device), "reference", "torch", "triton", or where
            they are installed "flex" (FlexAttention) and "natten".

    Returns `[B, *space, Hq, Dv]` in the query's dtype; a row that sees no key gives 0 (lse -inf). Differentiable in
    all tensors, through lse too. Raises ValueError for what does not fit, naming the argument and the axis.
    """
    space = check_grid(query, key, value)
    geometry = geometry_of(space, kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, query.shape[-2], geometry)
    masks = (key_mask, additional_key_mask)
    keys, values, mask = with_extra(key, value, additional_keys, additional_values, masks, space)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    require_one_of("backend", backend, _BACKENDS)
    query, keys, values = autocast(query.flatten(1, -3), keys, values)
    if backend in ("flex", "natten"):
        out, lse = _named(backend, query, keys, values, rpb, mask, geometry, scale)
        return (out.unflatten(1, space), lse.unflatten(1, space)) if return_lse else out.unflatten(1, space)
    path = _path("neighborhood_attention", backend, query, query.shape[3], values.shape[3])
    out, lse = _attend(path, query, keys, values, rpb, mask, geometry, scale, return_lse)
    out = out.unflatten(1, space)
    return (out, lse.unflatten(1, space)) if return_lse else out


def na_qk(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    rpb: Tensor | None = None,
    is_causal: Flags = False,
    backend: str = "auto",
) -> Tensor:
    """Unscaled scores of every query with the keys of its window, slot by slot.

    Args:
        query, key: `[B, H, *space, D]`, heads first.
        kernel_size, dilation, is_causal, rpb: as in `neighborhood_attention`.
        backend: "auto", "reference" or "torch".

    Returns `[B, H, *space, prod(kernel_size)]`, window-major (last axis fastest); slots without a key, which only
    causal axes have, give -inf. Differentiable.

    Raises ValueError for shapes and windows that do not fit, naming the argument.
    """
    space = check_heads_first("query", query, "key", key)
    if query.shape != key.shape:
        raise ValueError(f"query and key must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}")
    geometry = geometry_of(space, kernel_size, 1, dilation, is_causal)
    check_rpb(rpb, query.shape[1], geometry)
    query, key = autocast(query.flatten(2, -2), key.flatten(2, -2))
    from hf_attn.ops.hfattn_sparse.neighborhood import unfused_op

    if _unfused_path("na_qk", backend, query) == "reference":
        scores = unfused_op.run_scores_reference(query, key, rpb, _windows(geometry))
    else:
        scores = unfused_op.na_qk(query, key, rpb, *_unstrided(geometry))
    return scores.unflatten(2, space)


def na_av(
    weights: Tensor,
    value: Tensor,
    *,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    backend: str = "auto",
) -> Tensor:
    """Sum over the window of weight times value.

    Args:
        weights: `[B, H, *space, prod(kernel_size)]` as `na_qk` orders them, of any kind (no softmax is assumed); those
            of slots without a key are ignored.
        value: `[B, H, *space, Dv]`, heads first.
        kernel_size, dilation, is_causal, backend: as in `na_qk`.

    Returns `[B, H, *space, Dv]`. Differentiable.

    Raises ValueError for shapes and windows that do not fit, naming the argument.
    """
    space = check_heads_first("weights", weights, "value", value)
    geometry = geometry_of(space, kernel_size, 1, dilation, is_causal)
    slots = math.prod(geometry[1])
    if weights.shape != (*value.shape[:-1], slots):
        raise ValueError(
            f"weights must be {[*value.shape[:-1], slots]} for this value and kernel_size {tuple(geometry[1])}, got "
            f"{list(weights.shape)}"
        )
    weights, value = autocast(weights.flatten(2, -2), value.flatten(2, -2))
    from hf_attn.ops.hfattn_sparse.neighborhood import unfused_op

    if _unfused_path("na_av", backend, value) == "reference":
        mixed = unfused_op.run_values_reference(weights, value, _windows(geometry))
    else:
        mixed = unfused_op.na_av(weights, value, *_unstrided(geometry))
    return mixed.unflatten(2, space)


def neighborhood_mask(
    space: Sequence[int],
    *,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    stride: Sizes = 1,
    is_causal: Flags = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which key each query sees, bool `[N, N]` over the flattened grid (last axis fastest).

    Raises ValueError for windows that do not fit the grid, naming the axis.
    """
    if not 1 <= len(space) <= 3:
        raise ValueError(f"space must have one to three axes, got {tuple(space)}")
    from hf_attn.ops.hfattn_sparse.neighborhood.geometry import visible

    return visible(_windows(geometry_of(tuple(space), kernel_size, stride, dilation, is_causal))).to(device)


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of several, from their outputs `[..., D]` and lse `[...]`.

    Computed in fp32 (fp64 for fp64), differentiable through outputs and lse. Rows that saw no key (lse -inf)
    contribute nothing. Returns output and lse. Raises ValueError unless all shapes agree.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be as many, at least one, got {len(outputs)} and {len(lses)}")
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"every output must be {tuple(outputs[0].shape)} with lse {tuple(outputs[0].shape[:-1])}, got "
                f"{tuple(out.shape)} and {tuple(lse.shape)}"
            )
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    total = stacked.logsumexp(0)
    shares = (stacked - torch.where(total == float("-inf"), 0, total)).exp()[..., None]
    merged = sum(share * out.to(dtype) for share, out in zip(shares, outputs, strict=True))
    return merged.to(outputs[0].dtype), total


# -- paths -----------------------------------------------------------------------------------------------------------


def _path(op: str, backend: str, query: Tensor, *head_dims: int) -> Path:
    if backend in ("reference", "torch"):
        return "reference" if backend == "reference" else "torch"
    if backend == "triton":
        obstacle = triton_obstacle(query, head_dims)
        if obstacle is not None:
            raise RuntimeError(f"backend='triton' cannot run {op}: {obstacle}; use 'auto', 'torch' or 'reference'")
        return "triton"
    return choose_path(op, query, *head_dims)


def _named(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """FlexAttention or natten, which "auto" never chooses."""
    if rpb is not None or mask is not None:
        raise ValueError(f"backend={backend!r} has no rpb and no key masks; use 'auto'")
    if backend == "flex":
        from hf_attn.ops.hfattn_sparse.neighborhood import flex_path

        return flex_path.forward(query, key, value, windows=_windows(geometry), scale=scale)
    try:
        import natten
    except ImportError as error:
        raise RuntimeError("backend='natten' needs the package natten, which is not installed; use 'auto'") from error
    space, kernel, stride, dilation, causal = (tuple(x) for x in geometry)
    count, extra = math.prod(space), {}
    if key.shape[1] > count:
        extra = {"additional_keys": key[:, count:], "additional_values": value[:, count:]}
    function = getattr(natten, f"na{len(space)}d")
    out, lse = function(
        query.unflatten(1, space), key[:, :count].unflatten(1, space), value[:, :count].unflatten(1, space),
        kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal, scale=scale, return_lse=True, **extra,
    )  # fmt: skip
    return out.flatten(1, -3), lse.flatten(1, -2)


def _unfused_path(op: str, backend: str, tensor: Tensor) -> Path:
    require_one_of("backend", backend, ("auto", "reference", "torch"))
    return _path(op, backend, tensor)


def _windows(geometry: Geometry):
    from hf_attn.ops.hfattn_sparse.neighborhood.op import windows_of

    return windows_of(*geometry)


def _unstrided(geometry: Geometry) -> tuple[list, ...]:
    space, kernel, _, dilation, causal = geometry
    return space, kernel, dilation, causal


def _attend(
    path: Path,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    from hf_attn.ops.hfattn_sparse.neighborhood import op

    if path == "reference":
        return op.run_reference(query, key, value, rpb, mask, _windows(geometry), scale)
    if path == "triton":
        from hf_attn.ops.hfattn_sparse.neighborhood import triton_op as op
    return op.neighborhood_attention(query, key, value, rpb, mask, *geometry, scale, want_lse)
