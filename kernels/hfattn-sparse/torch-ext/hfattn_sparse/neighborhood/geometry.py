"""Which keys a query of a token grid sees: the window rule of each axis, exact at borders."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The window along one axis of `length` tokens.

    Args:
        kernel: keys per query; stride: queries that share a window; dilation: distance between neighbouring keys;
        causal: no key after the query.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False


def group_lengths(window: Window) -> list[int]:
    """Tokens of each dilation group: tokens g, g + dilation, ... attend among themselves only."""
    return [-(-(window.length - g) // window.dilation) for g in range(window.dilation)]


def group_bounds(window: Window, length: int) -> tuple[Tensor, Tensor]:
    """First key and end of the window of every query in a dilation group of `length` tokens, int64 `[length]` each.

    A window is centred on its query (an even one has one key more on the left) and moved inward at borders, so that it
    always holds `kernel` keys. With a stride the queries of a run share the window of its middle query (right of the
    middle for even strides). A causal window ends at its query and is cut at the start; a run shares the start of its
    last query's window. (Generalized Neighborhood Attention, arXiv 2504.16922; borders as in arXiv 2204.07143.)
    """
    query = torch.arange(length)
    kernel, stride = window.kernel, window.stride
    run = query.div(stride, rounding_mode="floor") * stride
    if window.causal:
        leader = (run + stride - 1).clamp(max=length - 1)
        return (leader - kernel + 1).clamp(min=0), query + 1
    leader = (run + stride // 2).clamp(max=length - 1)
    left, right = kernel // 2, (kernel - 1) // 2
    # A centre too near to a border moves inward; only one border can be near, as kernel <= length.
    low = leader.clamp(min=left).clamp(max=max(length - 1 - right, left)) - left
    return low, low + kernel


def axis_windows(window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Group, first key and end of every position of an axis, int64 `[length]` each; keys count within the group."""
    position = torch.arange(window.length)
    group = position % window.dilation
    low, high = torch.empty_like(position), torch.empty_like(position)
    for g, length in enumerate(group_lengths(window)):
        low[g :: window.dilation], high[g :: window.dilation] = group_bounds(window, length)
    return group, low, high


def axis_visible(window: Window) -> Tensor:
    """Whether the query (row) sees the key (column) along one axis, bool `[length, length]`."""
    group, low, high = axis_windows(window)
    place = torch.arange(window.length).div(window.dilation, rounding_mode="floor")
    return (group[:, None] == group) & (low[:, None] <= place) & (place < high[:, None])


def visible(windows: tuple[Window, ...]) -> Tensor:
    """Bool `[N, N]` over the flattened grid, last axis fastest: the conjunction of the axes."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for window in windows:
        axis = axis_visible(window)
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask


def bias_places(windows: tuple[Window, ...]) -> Tensor:
    """Entry of a flattened table `[2 K - 1, ...]` of relative positions for each (query, key), int64 `[N, N]`.

    Positions count within dilation groups; pairs that no window joins get some valid entry.
    """
    places = torch.zeros(1, 1, dtype=torch.int64)
    for window in windows:
        spot = torch.arange(window.length).div(window.dilation, rounding_mode="floor")
        width = 2 * window.kernel - 1
        axis = (spot - spot[:, None] + window.kernel - 1).clamp(0, width - 1)
        places = (places[:, None, :, None] * width + axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return places


def window_places(windows: tuple[Window, ...]) -> tuple[Tensor, Tensor]:
    """Flat grid position of every window slot, int64 `[N, prod K]`, and whether it holds a key (bool, same shape).

    Slots are in window-major order, last axis fastest; an empty slot (of a causal window) names position 0.
    """
    places, real = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for window in windows:
        group, low, high = axis_windows(window)
        slot = low[:, None] + torch.arange(window.kernel)
        place = slot * window.dilation + group[:, None]
        places = (places[:, None, :, None] * window.length + place[None, :, None, :]).flatten(2).flatten(0, 1)
        real = (real[:, None, :, None] & (slot < high[:, None])[None, :, None, :]).flatten(2).flatten(0, 1)
    return places.where(real, 0), real


def tokens(windows: tuple[Window, ...]) -> int:
    """Tokens of the grid."""
    return math.prod(window.length for window in windows)
