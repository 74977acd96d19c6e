"""The block of EMOv2: an inverted residual whose expansion is a convolution or spanned window attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, relu, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn import ops
from hf_attn.models.vision.attention import attend
from hf_attn.models.vision.layers import ChannelLayerNorm, DropPath
from hf_attn.ops.spanned_window import Mode

EPS = 1e-6
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": silu, "gelu": gelu, "relu": relu}


class EMOv2LayerNorm(nn.Module):
    """LayerNorm over the channels of `[B, C, H, W]`, wrapped as in published checkpoints."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels, eps=EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return self.norm(hidden)


def make_norm(kind: str, channels: int) -> nn.Module:
    """ "bn" or "ln" over `channels`."""
    return nn.BatchNorm2d(channels, eps=EPS) if kind == "bn" else EMOv2LayerNorm(channels)


class EMOv2ConvLayer(nn.Module):
    """Convolution with padding kernel // 2, then BatchNorm and activation where asked for."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        norm: bool = False,
        act: str | None = None,
    ) -> None:
        super().__init__()
        groups = channels_in if depthwise else 1
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(channels_out, eps=EPS) if norm else nn.Identity()
        self.act = act

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, channels_out, H / stride, W / stride]`."""
        hidden = self.norm(self.conv(hidden))
        if self.act is None:
            return hidden
        # The maps are large and memory is what costs: without gradients nobody else needs the convolution's output.
        in_place: dict[str, bool] = {} if self.act == "gelu" or torch.is_grad_enabled() else {"inplace": True}
        return ACTIVATIONS[self.act](hidden, **in_place)


class EMOv2ConvExpansion(nn.Module):
    """1x1 convolution and activation."""

    def __init__(self, dim: int, mid: int, act: str, bias: bool) -> None:
        super().__init__()
        self.net = EMOv2ConvLayer(dim, mid, bias=bias, act=act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> `[B, mid, H, W]`."""
        return self.net(hidden)


class EMOv2AttentionExpansion(nn.Module):
    """Spanned window attention (arXiv 2412.06674): close and remote windows share queries, keys and values.

    The map is padded with zeros to a multiple of the window before the projections, so padded tokens are keys like any
    other: theirs are the biases.
    """

    is_causal = False

    def __init__(
        self, dim: int, mid: int, act: str, bias: bool, *, head_dim: int, window: int, mode: Mode, config: Any = None
    ) -> None:
        super().__init__()
        self.num_heads, self.scale = dim // head_dim, head_dim**-0.5
        self.window, self.mode, self.config = window, mode, config
        self.qk = EMOv2ConvLayer(dim, 2 * dim, bias=bias)
        self.v = EMOv2ConvLayer(dim, mid, bias=bias, act=act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> `[B, mid, H, W]`."""
        height, width = hidden.shape[2:]
        if self.window > 0:
            below, right = -height % self.window, -width % self.window
            if below or right:
                hidden = pad(hidden, (0, right, 0, below))
        query, key = self.qk(hidden).chunk(2, 1)
        out = ops.spanned_window_attention(
            query,
            key,
            self.v(hidden),
            self.window,
            self.mode,
            num_heads=self.num_heads,
            scale=self.scale,
            attend=None if self.config is None else partial(attend, self, scale=self.scale),
        )
        return out[:, :, :height, :width]


class EMOv2LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), float(value)))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return self.gamma * hidden


class EMOv2Block(GradientCheckpointingLayer):
    """Improved inverted residual mobile block (i2RMB).

    Args:
        dim_in, dim_out: channels before and after.
        expand_ratio: `int(dim_in * expand_ratio)` channels in between.
        expansion: "conv", or attention: "close", "remote", "hybrid" (the sum of both).
        norm, act: of the block's input and its expansion; the depthwise branch always has BatchNorm and SiLU.
        kernel, stride: of the depthwise convolution.
        head_dim: channels of a head's queries and keys; a head's values have mid / (dim_in / head_dim).
        window: rows and columns of a window, 0 = the whole map.
        drop_path: rate of stochastic depth; blocks without a skip have none.
        config: of the model, whose attention implementation is used; None for torch's SDPA.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        expand_ratio: float,
        expansion: str = "conv",
        norm: str = "bn",
        act: str = "silu",
        kernel: int = 5,
        stride: int = 1,
        head_dim: int = 16,
        window: int = 7,
        qkv_bias: bool = True,
        has_skip: bool = True,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        config: Any = None,
    ) -> None:
        super().__init__()
        mid = int(dim_in * expand_ratio)
        self.has_skip = has_skip and dim_in == dim_out and stride == 1
        self.norm = make_norm(norm, dim_in)
        expand: nn.Module
        if expansion == "conv":
            expand = EMOv2ConvExpansion(dim_in, mid, act, qkv_bias)
        else:
            check_heads(dim_in, mid, head_dim)
            expand = EMOv2AttentionExpansion(
                dim_in, mid, act, qkv_bias, head_dim=head_dim, window=window, mode=cast(Mode, expansion), config=config
            )
        self.eops = nn.ModuleList([expand])
        self.conv_local = EMOv2ConvLayer(mid, mid, kernel, stride, depthwise=True, norm=True, act="silu")
        self.proj = EMOv2ConvLayer(mid, dim_out)
        self.ls = EMOv2LayerScale(dim_out, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, dim_in, H, W]` -> `[B, dim_out, ceil(H / stride), ceil(W / stride)]`."""
        wide = self.eops[0](self.norm(hidden))
        local = self.conv_local(wide)
        if not self.has_skip:
            return self.ls(self.proj(local))
        # The skip goes around the depthwise convolution as well.
        out = self.proj(wide + local)
        if self.training and self.drop_path.rate:
            return hidden + self.drop_path(self.ls(out))
        return torch.addcmul(hidden, out, self.ls.gamma)


def check_heads(dim: int, mid: int, head_dim: int) -> None:
    """Raise ValueError unless heads of `head_dim` fit `dim` channels and divide the `mid` channels of the values."""
    if head_dim < 1 or dim % head_dim:
        raise ValueError(f"head_dim={head_dim} must be >= 1 and divide the stage's {dim} channels")
    if mid % (dim // head_dim):
        raise ValueError(
            f"the {mid} value channels (channels x expand_ratio) must be a multiple of the {dim // head_dim} heads "
            f"that head_dim={head_dim} gives"
        )
