"""Neighborhood attention (arXiv 2403.04690; strides arXiv 2504.16922): a window around each image or video token."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.checks import require_int
from hf_attn.grid import TokenGrid
from hf_attn.mechanism import Capabilities, DiffusionConfig, Mechanism
from hf_attn.ops import dense_attention, neighborhood_attention, neighborhood_mask

# Of image and video tokens, when neither kernel_size nor density says: what GNA publishes for video models.
DEFAULT_DENSITY = 0.1
_AXES = ("frames", "height", "width")
Sizes = int | list[int] | tuple[int, ...]


@dataclass
class NeighborhoodConfig(DiffusionConfig):
    """Every image or video token attends to a window around it and to all text or prefix tokens; these see everything.

    `density`, `dense_steps`, `min_tokens`, `schedule`, `strict` and `layers` are the common ones. Options by axis are
    one integer for all axes, (height, width), or (frames, height, width); two entries on a video leave the time axis
    whole.

    Args:
        kernel_size: keys along each axis, >= 2. None: windows of the grid's proportions that give `density` (default
            0.1).
        stride: queries that share one window along each axis, 1 to `kernel_size`; larger ones are faster (tiles), the
            kernel size gives blocks.
        dilation: distance between the keys of a window.
        grid: (height, width) or (frames, height, width) of flat tokens, for vision models, which do not tell it.
        prefix_tokens: tokens before the grid (class token, registers), with `grid` only.

    A window larger than an axis is cut to it; with `strict` it raises. `min_tokens` is 0 here: small maps have small
    windows.
    """

    min_tokens: int = field(default=0, kw_only=True)

    kernel_size: Sizes | None = None
    stride: Sizes = 1
    dilation: Sizes = 1
    grid: list[int] | tuple[int, ...] | None = None
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 2), ("stride", 1), ("dilation", 1), ("grid", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            entries = list(value) if isinstance(value, list | tuple) else [value]
            if isinstance(value, list | tuple) and len(value) not in (2, 3):
                raise ValueError(
                    f"{name} must have 2 (height, width) or 3 (frames, height, width) entries, got {value}"
                )
            for entry in entries:
                require_int(name, entry, least)
            setattr(self, name, entries if isinstance(value, list | tuple) else value)
        if isinstance(self.grid, int):
            raise ValueError(f"grid must be (height, width) or (frames, height, width), got {self.grid}")
        require_int("prefix_tokens", self.prefix_tokens, 0)
        if self.prefix_tokens and self.grid is None:
            raise ValueError(f"prefix_tokens={self.prefix_tokens} needs grid=(height, width)")
        if self.kernel_size is not None and (self.density is not None or self.schedule is not None):
            raise ValueError("give kernel_size, or density / schedule, not both: each of them fixes the window")
        super().__post_init__()


@dataclass(frozen=True)
class Windows:
    """The window of a call: the axes longer than one token, and along each of them kernel, stride and dilation."""

    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel, "stride": self.stride, "dilation": self.dilation}


def attend(call: AttentionCall, config: NeighborhoodConfig) -> Tensor:
    """`[B, Hq, N, Dv]`: windows for tokens of the grid, full attention for the others."""
    grid = _grid(call, config)
    if call.k_len < config.min_tokens:
        call.layer.record(path="dense", reason=f"fewer than min_tokens={config.min_tokens} tokens")
        return dense_attention(call)
    windows = windows_of(grid, config)
    real = call.tokens.real_keys()
    if call.layer.recording:
        call.layer.record(path="sparse", **_pairs(call, grid, windows, real))
    query, key, value = (
        x[:, :, grid.lattice].transpose(1, 2).unflatten(1, windows.space) for x in (call.query, call.key, call.value)
    )
    extra: dict[str, Any] = {}
    if grid.text:
        keys, values = (_beside(grid, x, 2).transpose(1, 2) for x in (call.key, call.value))
        extra = {"additional_keys": keys, "additional_values": values}
    if real is not None:
        extra["key_mask"] = real[:, grid.lattice].unflatten(1, windows.space)
        if grid.text:
            extra["additional_key_mask"] = _beside(grid, real, 1)
    near = neighborhood_attention(query, key, value, scale=call.scale, **windows.options, **extra)
    near = near.flatten(1, -3).transpose(1, 2)
    if real is not None:
        near = near.masked_fill(~real[:, None, grid.lattice, None], 0)
    if not grid.text:
        return near
    before, after = _beside_attention(call, grid).split([grid.text_before, grid.text_after], 2)
    return torch.cat([before, near, after], 2)


def windows_of(grid: TokenGrid, config: NeighborhoodConfig) -> Windows:
    """The window on a grid; raises ValueError for dilations that do not fit, and with `strict` for kernels."""
    # Sizes of two entries leave the frames of a video whole.
    wanted = _kernel_for(grid, config) if config.kernel_size is None else _per_axis(config.kernel_size, grid.frames)
    stride, dilation = _per_axis(config.stride, 1), _per_axis(config.dilation, 1)
    axes = []
    for axis, length, k, s, d in zip(_AXES, grid.shape, wanted, stride, dilation, strict=True):
        if length == 1:
            continue
        if k * d > length and (config.strict or d > 1):
            raise ValueError(
                f"kernel_size {k} * dilation {d} = {k * d} exceeds the {length} tokens along {axis} of the grid "
                f"{'x'.join(map(str, grid.shape))}; use a smaller kernel_size or dilation"
            )
        if k > length:
            _warn_once(f"kernel_size {k} exceeds the {length} tokens along {axis}: that axis is read whole")
        k = min(k, length)
        if s > k and config.kernel_size is not None and k != length:
            raise ValueError(f"stride along {axis} must be from 1 to kernel_size={k}, got {s}")
        axes.append((length, k, min(s, k), d))
    space, kernel, stride_of, dilation_of = zip(*axes, strict=True)
    return Windows(space, kernel, stride_of, dilation_of)


def attended(call: AttentionCall, config: NeighborhoodConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B | 1, 1, R, N]`."""
    grid = _grid(call, config)
    if call.k_len < config.min_tokens:
        return call.tokens.visible(False, call.query.device)[:, :, rows]
    windows = windows_of(grid, config)
    mask = torch.ones(grid.length, grid.length, dtype=torch.bool, device=call.query.device)
    mask[grid.lattice, grid.lattice] = neighborhood_mask(windows.space, **windows.options, device=mask.device)
    mask, real = mask[rows][None, None], call.tokens.real_keys()
    return mask if real is None else mask & real[:, None, None]


def describe(config: NeighborhoodConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """What calls of this length would do."""
    facts: dict[str, Any] = {"min_tokens": config.min_tokens, "dense": k_len < config.min_tokens}
    if config.kernel_size is None:
        density = DEFAULT_DENSITY if config.density is None else config.density
        return {"density": density, "window": "of the grid's proportions", **facts}
    if config.grid is None:
        return {"density": None, "density follows": "kernel_size and the latent grid", **facts}
    windows = windows_of(_flat_grid(config.grid, config.prefix_tokens), config)
    return {"density": math.prod(windows.kernel) / math.prod(windows.space), **facts}


def _grid(call: AttentionCall, config: NeighborhoodConfig) -> TokenGrid:
    """Where the tokens lie; raises ValueError for calls that cannot work."""
    if call.causal:
        raise ValueError(
            "neighborhood windows lie on images and videos, but this layer is causal; for language models use "
            "'streaming' (a sliding window with sinks)"
        )
    if call.q_len != call.k_len:
        raise ValueError(f"neighborhood needs as many queries as keys, got {call.q_len} and {call.k_len}")
    if call.tokens.dense is not None or call.tokens.window is not None or call.tokens.roles is not None:
        raise ValueError("neighborhood follows padding only, but this layer has a mask or a window of its own")
    grid = call.tokens.grid
    if grid is None:
        if config.grid is None:
            raise ValueError(
                f"neighborhood needs the grid of the {call.k_len} tokens, which this model does not tell; pass "
                "grid=(height, width), and prefix_tokens= for class tokens and registers"
            )
        grid = _flat_grid(config.grid, config.prefix_tokens)
    grid.check_length(call.k_len)
    if max(grid.shape) < 2:
        raise ValueError("neighborhood needs a grid of at least two tokens, got one")
    return grid


def _flat_grid(sizes: Sequence[int], prefix_tokens: int) -> TokenGrid:
    frames, height, width = [1, *sizes][-3:]
    return TokenGrid(frames, height, width, text_before=prefix_tokens)


def _per_axis(value: Sizes, whole: int) -> list[int]:
    """One entry for frames, height and width; `whole` where two entries leave out the frames of a video."""
    if isinstance(value, int):
        return [value] * 3
    return [whole, *value][-3:]


def _kernel_for(grid: TokenGrid, config: NeighborhoodConfig) -> list[int]:
    """Windows of the grid's proportions with the wanted share of its tokens."""
    density = DEFAULT_DENSITY if config.density is None else config.density
    axes = [n for n in grid.shape if n > 1]
    shrink = density ** (1 / len(axes))
    dilation = _per_axis(config.dilation, 1)
    return [max(2, min(round(n * shrink), n // d)) for n, d in zip(grid.shape, dilation, strict=True)]


def _pairs(call: AttentionCall, grid: TokenGrid, windows: Windows, real: Tensor | None) -> dict[str, Any]:
    """(query, key) pairs computed and visible, over batch rows and heads; padding is neither."""
    batch, heads = call.query.shape[:2]
    lattice = grid.tokens * math.prod(windows.kernel)
    text = grid.text * batch if real is None else int(_beside(grid, real, 1).sum())
    squared = grid.text**2 * batch if real is None else int(_beside(grid, real, 1).sum(1).square().sum())
    beside = 2 * text * grid.tokens + squared
    return {
        "computed": float(heads * (batch * lattice + beside)),
        "visible": float(heads * (batch * grid.tokens**2 + beside)),
    }


def _beside(grid: TokenGrid, x: Tensor, dim: int) -> Tensor:
    """The tokens off the grid."""
    before = x.narrow(dim, 0, grid.text_before)
    return torch.cat([before, x.narrow(dim, grid.lattice.stop, grid.text_after)], dim)


def _beside_attention(call: AttentionCall, grid: TokenGrid) -> Tensor:
    """Full attention of the tokens off the grid."""
    query, index = _beside(grid, call.query, 2), call.tokens.index
    tokens = TokenLayout.full(query.shape[0], grid.text, call.k_len)
    if index is not None:
        queries = _beside(grid, index[..., : call.q_len], 2)
        tokens = replace(tokens, index=torch.cat([queries, index[..., call.q_len :]], 2))
    return dense_attention(AttentionCall(query, call.key, call.value, call.scale, False, tokens))


@cache
def _warn_once(message: str) -> None:
    warnings.warn(f"hf_attn: {message}", stacklevel=4)


MECHANISM = Mechanism(
    name="neighborhood",
    summary="a window around each token of an image or video, with stride and dilation; for DiTs and vision models",
    source="Faster Neighborhood Attention, arXiv 2403.04690",
    config=NeighborhoodConfig,
    capabilities=Capabilities(decode=False, packing=False, triton=True, diffusers=True),
    attend=attend,
    attended=attended,
    describe=describe,
)
