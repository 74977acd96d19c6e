"""The four ways a scan walks over a square image, and moving features onto them and back."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

PATHS = 4


@cache
def scan_paths(side: int, continuous: bool = True) -> Tensor:
    """Row-major positions in the order of each path, int64 `[4, side * side]`.

    continuous: snakes, whose steps all go to a neighbour: rows downward from the top left, rows upward from the bottom
    left, columns rightward from the bottom left, columns leftward from the bottom right. Otherwise row-major,
    column-major and their reversals.
    """
    grid = torch.arange(side * side).view(side, side)
    if not continuous:
        rows = torch.stack([grid.flatten(), grid.mT.flatten()])
        return torch.cat([rows, rows.flip(1)])
    snake = torch.arange(side).expand(side, side).clone()
    snake[1::2] = snake[1::2].flip(1)
    slow = torch.arange(side)[:, None]
    last = side - 1
    return torch.stack(
        [grid[slow, snake], grid[last - slow, snake], grid[last - snake, slow], grid[last - snake, last - slow]]
    ).flatten(1)


@cache
def _inverse(side: int, continuous: bool) -> Tensor:
    """Place of every position on each path, as an index into the four paths end to end, `[4 * side * side]`."""
    places = scan_paths(side, continuous).argsort(1)
    return (places + torch.arange(PATHS)[:, None] * side * side).flatten()


def spread(features: Tensor, side: int, continuous: bool) -> Tensor:
    """`[B, L, E]` along the four paths, `[B, 4, L, E]`."""
    order = scan_paths(side, continuous).flatten().to(features.device)
    return _Spread.apply(features, order, _inverse(side, continuous).to(features.device))


def collect(features: Tensor, side: int, continuous: bool) -> Tensor:
    """`[B, 4, L, E]` back to the positions, summed over the paths, `[B, L, E]`."""
    order = scan_paths(side, continuous).flatten().to(features.device)
    return _Collect.apply(features, order, _inverse(side, continuous).to(features.device))


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
