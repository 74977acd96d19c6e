"""Layers that several vision backbones use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch of whole samples and scale the rest (arXiv 1603.09382)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """`[B, ...]` -> the same shape."""
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        kept = torch.rand(branch.shape[0], *(1,) * (branch.dim() - 1), device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)

    def extra_repr(self) -> str:
        """As torch asks for it: what `print` shows."""
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of all blocks, stage by stage: linear from 0 in the first block to `rate` in the last."""
    last = max(sum(depths) - 1, 1)
    rates, start = [], 0
    for depth in depths:
        rates.append([rate * index / last for index in range(start, start + depth)])
        start += depth
    return rates


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, H, W]`."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        normed = layer_norm(maps.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


@torch.no_grad()
def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution `[O, I, kh, kw]` followed by an evaluation-mode batch norm, as one convolution.

    Computed in fp64 and rounded once.
    """
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    start = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    folded = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
    return folded.to(weight.dtype), (norm.bias.double() + start * scale).to(weight.dtype)
