"""Blocks of PATNet: partial attention (channel, self, spatial). Maps are `[B, C, H, W]`, names the official ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, linear

from hf_attn.models.patnet.configuration_patnet import PatNetConfig
from hf_attn.models.vision.attention import attend
from hf_attn.models.vision.layers import ChannelLayerNorm

_BUCKETS: dict[tuple, Tensor] = {}


def distance_buckets(height: int, width: int, ratio: int, device: torch.device | str = "cpu") -> Tensor:
    """Bucket of the Euclidean distance of every pair of positions of a map (image RPE, arXiv 2107.14222, eq. 18).

    round(d) up to `ratio`; beyond, logarithmically growing buckets, at most 2 ratio, which a distance of 8 ratio
    reaches. Halves round to even.

    Returns int64 `[H W, H W]`, positions row-major.
    """
    found = _BUCKETS.get((height, width, ratio, str(device)))
    if found is not None:
        return found
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    squares = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()
    distance = squares.float().sqrt().round()
    far = ratio + (distance.clamp_min(1) / ratio).log() / math.log(8) * ratio
    buckets = torch.where(distance <= ratio, distance, far.round().clamp_max(2 * ratio)).long()
    if not torch.compiler.is_compiling():
        # A video or a change of size would otherwise grow this without end.
        if len(_BUCKETS) >= 64:
            _BUCKETS.clear()
        _BUCKETS[height, width, ratio, str(device)] = buckets
    return buckets


class RelativeBias(nn.Module):
    """A learned bias a head and distance, `[heads, N, N]`; half of the table is never read, as in the authors' code."""

    def __init__(self, heads: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.lookup_table_bias = nn.Parameter(torch.zeros(heads, 4 * ratio + 1))

    def forward(self, height: int, width: int) -> Tensor:
        buckets = distance_buckets(height, width, self.ratio, self.lookup_table_bias.device)
        return self.lookup_table_bias[:, buckets + 2 * self.ratio]


class SelfAttention(nn.Module):
    """Self-attention of all positions with a bias of their distance."""

    def __init__(self, config: PatNetConfig, width: int) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.attention_dropout)
        self.rpe_k = RelativeBias(self.num_heads, config.rpe_ratio)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        tokens = maps.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.rpe_k(height, width)[None].to(tokens.dtype)
        out = attend(self, *qkv, scale=self.scale, bias=bias, dropout=self.config.attention_dropout)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out.transpose(1, 2).unflatten(2, (height, width))


class ChannelGate(nn.Module):
    """A gate for each channel from mean and standard deviation of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(width, width, (1, 2), bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Gates `[B, C, 1, 1]`; statistics in fp32, the deviation with N - 1. Raises ValueError for one position."""
        if maps.shape[2] * maps.shape[3] < 2:
            raise ValueError(f"a map of {tuple(maps.shape[2:])} has no standard deviation; give larger images")
        variance, mean = torch.var_mean(maps.float() if maps.dtype != torch.float64 else maps, (2, 3))
        statistics = torch.cat([mean, variance.sqrt()], 1).to(maps.dtype)
        weight = self.cfc1.weight.squeeze(2)
        gate = linear(statistics, torch.cat([weight[..., 0], weight[..., 1]], 1))[..., None, None]
        return hardsigmoid(self.bn(gate))


class PartialAttention(nn.Module):
    """A 3x3 convolution of the first channels beside attention of the others.

    Args:
        kind: "channel" (gate, then batch norm), "self" (layer norm, then self-attention) or "none".
    """

    def __init__(self, config: PatNetConfig, width: int, kind: str) -> None:
        super().__init__()
        convolved = width // config.n_div
        self.widths, self.kind = [convolved, width - convolved], kind
        self.partial_conv3 = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)
        if kind == "channel":
            self.attn = ChannelGate(self.widths[1])
            self.norm = nn.BatchNorm2d(self.widths[1])
        elif kind == "self":
            self.attn = SelfAttention(config, self.widths[1])
            self.norm = ChannelLayerNorm(self.widths[1])

    def forward(self, maps: Tensor) -> Tensor:
        first, rest = maps.split(self.widths, 1)
        if self.kind == "channel":
            rest = self.norm(rest * self.attn(rest))
        elif self.kind == "self":
            rest = self.attn(self.norm(rest))
        return torch.cat([self.partial_conv3(first), rest], 1)


class SpatialGate(nn.Module):
    """A gate for each position on one half of the channels, a 1x1 convolution of the other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.widths = [width - half, half]
        self.conv_attn = nn.Conv2d(width - half, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width - half)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv = nn.Conv2d(half, half, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        gated, mixed = maps.split(self.widths, 1)
        gated = self.norm(gated * hardsigmoid(self.conv_attn(gated)))
        return torch.cat([gated, self.conv(self.norm2(mixed))], 1)
