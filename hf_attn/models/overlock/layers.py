"""Blocks of OverLoCK: the static one of Base-Net and Overview-Net, and the small pieces all blocks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.models.overlock.reparam import OverlockDilatedReparam
from hf_attn.models.vision.layers import ChannelLayerNorm, DropPath


class OverlockResidualConv(nn.Conv2d):
    """x + depthwise convolution of x."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return hidden + super().forward(hidden)


class OverlockGrn(nn.Module):
    """Global response normalisation: channels are weighted by their norm over the map (arXiv 2301.00808)."""

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        size = torch.linalg.vector_norm(hidden, dim=(2, 3), keepdim=True)
        share = size / (size.mean(1, keepdim=True) + self.eps)
        # (gamma * share + 1) * x + beta, with the factor on one number a channel.
        return torch.addcmul(self.beta, hidden, self.gamma * share + 1)


class OverlockSqueezeExcitation(nn.Module):
    """Channels scaled by a sigmoid of the pooled map; max(16, C // 8) channels in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(16, channels // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.GELU(),
            nn.Conv2d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return hidden * self.proj(hidden)


class OverlockLayerScale(nn.Module):
    """A factor and a shift for each channel."""

    def __init__(self, channels: int, value: float = 1.0) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), float(value)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return torch.addcmul(self.bias.view(1, -1, 1, 1), hidden, self.weight.view(1, -1, 1, 1))


def layer_scale(channels: int, value: float | None) -> nn.Module:
    """A layer scale that starts at `value`; the identity for None."""
    return nn.Identity() if value is None else OverlockLayerScale(channels, value)


def residual(
    skip: Tensor, branch: Tensor, scale: nn.Module, drop_path: Callable[[Tensor], Tensor], res_scale: bool
) -> Tensor:
    """The two residual forms: scale(skip) + branch with `res_scale`, else skip + scale(branch).

    skip and branch: `[B, C, H, W]`.
    """
    return scale(skip) + drop_path(branch) if res_scale else skip + drop_path(scale(branch))


def conv_norm(channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and batch norm."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels_out)
    )


def stem(channels_in: int, channels: int) -> nn.Sequential:
    """Four 3x3 convolutions, total stride 4."""
    half = channels // 2
    return nn.Sequential(
        *conv_norm(channels_in, half, 3, 2),
        nn.GELU(),
        *conv_norm(half, half, 3),
        nn.GELU(),
        *conv_norm(half, channels, 3, 2),
        nn.GELU(),
        *conv_norm(channels, channels, 3),
    )


def mlp(channels: int, hidden: int) -> nn.Sequential:
    """1x1 convolutions around a 3x3 depthwise one."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.GELU(),
        OverlockResidualConv(hidden),
        OverlockGrn(hidden),
        nn.Conv2d(hidden, channels, 1),
    )


class OverlockRepConvBlock(GradientCheckpointingLayer):
    """Large static kernel, squeeze-excitation and MLP in one branch.

    Args:
        dim: channels.
        kernel: size of the large kernel, odd, 5 to 19.
        mlp_ratio: channels in the middle of the MLP over `dim`.
        ls_init_value: start of the layer scale; None for none.
        res_scale: scale the skip instead of the branch.
        drop_path: rate of stochastic depth.
        deploy: build the large kernel reparameterised.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 7,
        mlp_ratio: float = 4,
        ls_init_value: float | None = None,
        res_scale: bool = True,
        drop_path: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.dwconv = OverlockResidualConv(dim)
        self.proj = nn.Sequential(
            ChannelLayerNorm(dim),
            OverlockDilatedReparam(dim, kernel, deploy),
            nn.BatchNorm2d(dim),
            OverlockSqueezeExcitation(dim),
            *mlp(dim, int(dim * mlp_ratio)),
        )
        self.drop_path = DropPath(drop_path)
        self.ls = layer_scale(dim, ls_init_value)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> the same shape."""
        hidden = self.dwconv(hidden)
        return residual(hidden, self.proj(hidden), self.ls, self.drop_path, self.res_scale)
