"""neighborhood_attention on grids of one, two or three axes, and its two products apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attn.checks import require_one_of
from hf_attn.ops.backend import Path, autocast, choose_path, triton_obstacle

# An integer for all axes, or one entry an axis.
Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]
_BACKENDS = ("auto", "reference", "torch", "triton", "flex", "natten")
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}


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
    space = _check_grid(query, key, value)
    geometry = _geometry(space, kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, query.shape[-2], geometry)
    masks = (key_mask, additional_key_mask)
    keys, values, mask = _with_extra(key, value, additional_keys, additional_values, masks, space)
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
    """
    space = _check_heads_first("query", query, "key", key)
    if query.shape != key.shape:
        raise ValueError(f"query and key must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}")
    geometry = _geometry(space, kernel_size, 1, dilation, is_causal)
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
    """
    space = _check_heads_first("weights", weights, "value", value)
    geometry = _geometry(space, kernel_size, 1, dilation, is_causal)
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
    """Which key each query sees, bool `[N, N]` over the flattened grid (last axis fastest)."""
    if not 1 <= len(space) <= 3:
        raise ValueError(f"space must have one to three axes, got {tuple(space)}")
    from hf_attn.ops.hfattn_sparse.neighborhood.geometry import visible

    return visible(_windows(_geometry(tuple(space), kernel_size, stride, dilation, is_causal))).to(device)


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


# -- arguments -------------------------------------------------------------------------------------------------------

# Space, kernel size, stride, dilation and causality, one entry an axis.
Geometry = tuple[list[int], list[int], list[int], list[int], list[bool]]


def _geometry(space: Sequence[int], kernel_size: Sizes, stride: Sizes, dilation: Sizes, is_causal: Flags) -> Geometry:
    """Checked, one entry an axis."""
    names = _AXES[len(space)]
    kernel, strides, dilations = (
        _per_axis(name, value, len(space), int)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    causal = _per_axis("is_causal", is_causal, len(space), bool)
    for axis, length, k, s, d in zip(names, space, kernel, strides, dilations, strict=True):
        if k < 2:
            raise ValueError(f"kernel_size along {axis} must be >= 2, got {k}")
        if d < 1:
            raise ValueError(f"dilation along {axis} must be >= 1, got {d}")
        if not 1 <= s <= k:
            raise ValueError(f"stride along {axis} must be from 1 to kernel_size={k}, got {s}")
        if k * d > length:
            most = f"a dilation of at most {length // k}" if length >= k else f"a kernel_size of at most {length}"
            raise ValueError(
                f"kernel_size {k} * dilation {d} = {k * d} exceeds the {length} tokens along {axis}; use {most} or pad "
                "the grid"
            )
    return list(space), kernel, strides, dilations, causal


def _per_axis(name: str, value: Sizes | Flags, rank: int, kind: type) -> list:
    """One entry an axis; raises ValueError unless entries are of `kind` and as many as axes."""
    entries = list(value) if isinstance(value, Sequence) else [value] * rank
    if len(entries) != rank:
        raise ValueError(
            f"{name} must be one value or one for each of the {rank} axes of the grid, got {tuple(entries)}"
        )
    for entry in entries:
        if isinstance(entry, bool) != (kind is bool) or not isinstance(entry, kind | torch.SymInt):
            raise ValueError(f"{name} must hold {'booleans' if kind is bool else 'integers'}, got {value!r}")
    return entries


def check_rpb(rpb: Tensor | None, heads: int, geometry: Geometry) -> None:
    """Raise ValueError unless a table of relative positions fits (and windows are of the kind that have one)."""
    if rpb is None:
        return
    space, kernel, stride, _, causal = geometry
    for axis, k, s, c in zip(_AXES[len(space)], kernel, stride, causal, strict=True):
        problem = f"kernel_size {k} is even" if k % 2 == 0 else f"stride is {s}" if s != 1 else "it is causal"
        if k % 2 == 0 or s != 1 or c:
            raise ValueError(
                f"rpb needs odd kernel_size, stride 1 and no causal axis, but along {axis} {problem}; drop rpb or "
                "change the window"
            )
    wanted = (heads, *(2 * k - 1 for k in kernel))
    if tuple(rpb.shape) != wanted or not rpb.is_floating_point():
        raise ValueError(
            f"rpb must be floating-point {list(wanted)} (heads, 2 * kernel_size - 1 along each axis), got {rpb.dtype} "
            f"{list(rpb.shape)}"
        )


def _check_grid(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The grid of heads-last tensors; raises ValueError unless the three fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not 4 <= tensor.dim() <= 6:
            raise ValueError(
                f"{name} must be [batch, *space, heads, head_dim] with one to three axes in space, got shape "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != query.dtype:
            raise ValueError(f"query, key and value must have one floating-point dtype, got {name} {tensor.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must agree in all but head_dim, got {tuple(key.shape)}, {tuple(value.shape)}")
    if query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in batch, space and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"the number of query heads ({query.shape[-2]}) must be a multiple of the number of KV heads "
            f"({key.shape[-2]})"
        )
    return tuple(query.shape[1:-2])


def _check_heads_first(first: str, one: Tensor, second: str, other: Tensor) -> tuple[int, ...]:
    for name, tensor in ((first, one), (second, other)):
        if not 4 <= tensor.dim() <= 6:
            raise ValueError(
                f"{name} must be [batch, heads, *space, channels] with one to three axes in space, got shape "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != one.dtype:
            raise ValueError(f"{first} and {second} must have one floating-point dtype, got {one.dtype}, {other.dtype}")
    return tuple(other.shape[2:-1])


def _with_extra(
    key: Tensor,
    value: Tensor,
    more_keys: Tensor | None,
    more_values: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    space: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[B, N + M, Hkv, ...]` and a mask `[B, N + M]`."""
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_keys and additional_values must be given together, got one of them")
    batch, heads = key.shape[0], key.shape[-2]
    mask, more_mask = masks
    if mask is not None:
        if tuple(mask.shape) != (batch, *space) or mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool {[batch, *space]}, got {mask.dtype} {list(mask.shape)}")
        mask = mask.flatten(1)
    key, value = key.flatten(1, -3), value.flatten(1, -3)
    if more_keys is None or more_values is None:
        if more_mask is not None:
            raise ValueError("additional_key_mask needs additional_keys, got none")
        return key, value, mask
    count = more_keys.shape[1] if more_keys.dim() == 4 else -1
    for name, more, own in (("additional_keys", more_keys, key), ("additional_values", more_values, value)):
        wanted = (batch, count, heads, own.shape[-1])
        if tuple(more.shape) != wanted or more.dtype != own.dtype:
            raise ValueError(
                f"{name} must be [{batch}, tokens, {heads}, {own.shape[-1]}] in {own.dtype} and as many as "
                f"additional_keys, got {list(more.shape)} {more.dtype}"
            )
    if more_mask is not None and (tuple(more_mask.shape) != (batch, count) or more_mask.dtype != torch.bool):
        raise ValueError(
            f"additional_key_mask must be bool {[batch, count]}, got {more_mask.dtype} {list(more_mask.shape)}"
        )
    if mask is not None or more_mask is not None:
        shown = key.new_ones(batch, max(math.prod(space), count), dtype=torch.bool)
        mask = shown[:, : math.prod(space)] if mask is None else mask
        mask = torch.cat([mask, shown[:, :count] if more_mask is None else more_mask], 1)
    return torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1), mask


# -- paths -----------------------------------------------------------------------------------------------------------


def _path(op: str, backend: str, query: Tensor, *head_dims: int) -> Path:
    if backend in ("reference", "torch"):
        return backend
    if backend == "triton":
        obstacle = triton_obstacle(query, head_dims)
        if obstacle is not None:
            raise RuntimeError(f"backend='triton' cannot run {op}: {obstacle}; use 'auto', 'torch' or 'reference'")
        return backend
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
