"""The four ways a scan walks over a square image, and moving features onto them and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PATHS = 4
# Orders by side, kind and device: they are asked for in every block.
_KEPT: dict[tuple[int, bool, torch.device], tuple[Tensor, Tensor]] = {}


def scan_paths(side: int, continuous: bool = True, device: torch.device | None = None) -> Tensor:
    """Row-major positions in the order of each path, int64 `[4, side * side]`.

    continuous: snakes, whose steps all go to a neighbour: rows downward from the top left, rows upward from the bottom
    left, columns rightward from the bottom left, columns leftward from the bottom right. Otherwise row-major,
    column-major and their reversals.
    """
    grid = torch.arange(side * side, device=device).view(side, side)
    if not continuous:
        rows = torch.stack([grid.flatten(), grid.mT.flatten()])
        return torch.cat([rows, rows.flip(1)])
    fast, slow = torch.arange(side, device=device), torch.arange(side, device=device)[:, None]
    last = side - 1
    snake = torch.where(slow % 2 == 0, fast, last - fast)
    return torch.stack(
        [grid[slow, snake], grid[last - slow, snake], grid[last - snake, slow], grid[last - snake, last - slow]]
    ).flatten(1)


def orders(features: Tensor, side: int, continuous: bool) -> tuple[Tensor, Tensor]:
    """Positions in the order of the four paths, and the place of every position on each path, `[4 * side * side]`.

    Places count through the four paths end to end.
    """
    key = side, continuous, features.device
    plain = type(features) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if not plain:
        return _orders(*key)
    if key not in _KEPT:
        with torch.inference_mode(False):  # else no backward could save them later
            _KEPT[key] = _orders(*key)
    return _KEPT[key]


def _orders(side: int, continuous: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    paths = scan_paths(side, continuous, device)
    offsets = torch.arange(PATHS, device=device)[:, None] * side * side
    return paths.flatten(), (paths.argsort(1) + offsets).flatten()


def spread(features: Tensor, side: int, continuous: bool) -> Tensor:
    """`[B, L, E]` along the four paths, `[B, 4, L, E]`."""
    return _Spread.apply(features, *orders(features, side, continuous))


def collect(features: Tensor, side: int, continuous: bool) -> Tensor:
    """`[B, 4, L, E]` back to the positions, summed over the paths, `[B, L, E]`."""
    return _Collect.apply(features, *orders(features, side, continuous))


def along(maps: Tensor, side: int, continuous: bool) -> Tensor:
    """`[B, L, 4, X]`, values of each path's own, in the order of the paths, `[B, 4, L, X]`."""
    order, _ = orders(maps, side, continuous)
    paths = torch.arange(PATHS, device=maps.device)[:, None]
    return maps[:, order.view(PATHS, -1), paths]


# The two are adjoint. Autograd's own backward of an index is a scatter with additions, slower than another gather.
class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return features.index_select(1, order).unflatten(1, (PATHS, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Collect.apply(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return features.flatten(1, 2).index_select(1, inverse).unflatten(1, (PATHS, -1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None
