"""Large depthwise kernels that train as several dilated branches and run as one convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

# Kernel -> (kernel, dilation) of the branches beside it.
BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def check_kernel(name: str, size: int) -> None:
    """Raise ValueError unless branches are defined for this kernel."""
    if size not in BRANCHES:
        raise ValueError(f"{name}={size} must be an odd kernel from 5 to 19, one of {sorted(BRANCHES)}")


class OverlockDilatedReparam(nn.Module):
    """Depthwise convolution of kernel K plus dilated branches, a batch norm behind each (arXiv 2502.20087, section 3).

    Training runs every branch, as its batch norm needs. Evaluation runs the one kernel they add up to, whether or not
    `reparameterize` has been called: the same function up to rounding, differentiable in all branches.

    Args:
        channels: of input and output.
        kernel: K, a key of `BRANCHES`.
        deploy: build the single convolution with a bias.
    """

    def __init__(self, channels: int, kernel: int, deploy: bool = False) -> None:
        super().__init__()
        check_kernel("kernel", kernel)
        self.kernel, self.branches = kernel, BRANCHES[kernel]
        self.deploy = deploy
        self.lk_origin = self._conv(channels, kernel, 1, bias=deploy)
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(channels)
            for size, dilation in self.branches:
                self.add_module(f"dil_conv_k{size}_{dilation}", self._conv(channels, size, dilation))
                self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    @staticmethod
    def _conv(channels: int, kernel: int, dilation: int, bias: bool = False) -> nn.Conv2d:
        padding = dilation * (kernel - 1) // 2
        return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        if self.deploy:
            return self.lk_origin(hidden)
        if not self.training:
            weight, bias = self.merged()
            return conv2d(hidden, weight, bias, padding=self.kernel // 2, groups=weight.shape[0])
        out = self.origin_bn(self.lk_origin(hidden))
        for _, _, conv, norm in self._parts():
            out = out + norm(conv(hidden))
        return out

    def _parts(self) -> list[tuple[int, int, nn.Conv2d, nn.BatchNorm2d]]:
        return [
            (size, dilation, getattr(self, f"dil_conv_k{size}_{dilation}"), getattr(self, f"dil_bn_k{size}_{dilation}"))
            for size, dilation in self.branches
        ]

    def merged(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight `[C, 1, K, K]` and bias `[C]` of the sum of all branches in evaluation, added up in `dtype`."""
        weight, bias = _folded(self.lk_origin, self.origin_bn, dtype)
        for size, dilation, conv, norm in self._parts():
            small, shift = _folded(conv, norm, dtype)
            first = self.kernel // 2 - dilation * (size // 2)
            taps = slice(first, first + dilation * (size - 1) + 1, dilation)
            weight[:, :, taps, taps] += small
            bias = bias + shift
        return weight, bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Replace the branches by their sum, in place; harmless when repeated."""
        if self.deploy:
            return
        weight, bias = self.merged(torch.float64)
        conv = self._conv(weight.shape[0], self.kernel, 1, bias=True).to(self.lk_origin.weight)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        for size, dilation in self.branches:
            delattr(self, f"dil_conv_k{size}_{dilation}")
            delattr(self, f"dil_bn_k{size}_{dilation}")
        del self.origin_bn
        conv.requires_grad_(self.lk_origin.weight.requires_grad)
        self.lk_origin, self.deploy = conv, True


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A depthwise convolution without bias and the batch norm behind it, as one."""
    dtype = dtype or conv.weight.dtype
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    return conv.weight.to(dtype) * scale.view(-1, 1, 1, 1), norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale
