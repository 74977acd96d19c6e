"""PATNet in the official order: one torch operation after another, as the layers are written in the authors' code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu6

from hf_attn.models.patnet.configuration_patnet import PatNetConfig
from hf_attn.models.patnet.layers import distance_buckets

PRESETS = ("t0", "t2")


class _ChannelGate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cfc1, self.bn = nn.Conv2d(width, width, (1, 2), bias=False), nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        flat = maps.flatten(2)
        statistics = torch.stack([flat.mean(-1), flat.std(-1)], -1)[:, :, None]
        return maps * (relu6(self.bn(self.cfc1(statistics)) + 3) / 6)


class _Rpe(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.lookup_table_bias = nn.Parameter(torch.zeros(heads, 81))

    def forward(self, height: int, width: int) -> Tensor:
        return self.lookup_table_bias[:, (distance_buckets(height, width, 20) + 40).flatten()]


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj, self.rpe_k = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width), _Rpe(heads)

    def forward(self, maps: Tensor) -> Tensor:
        batch, channels, height, width = maps.shape
        tokens, count = maps.flatten(2).transpose(1, 2), height * width
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query * self.scale @ key.transpose(-2, -1)
        scores = scores + self.rpe_k(height, width).view(1, self.heads, count, count)
        out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, count, channels)
        return self.proj(out).transpose(1, 2).reshape(batch, channels, height, width)


class _ChannelNorm(nn.Module):
    """Written out over the channels, as in the authors' code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, maps: Tensor) -> Tensor:
        mean = maps.mean(1, keepdim=True)
        variance = (maps - mean).pow(2).mean(1, keepdim=True)
        maps = (maps - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * maps + self.bias[:, None, None]


class _Partial(nn.Module):
    def __init__(self, config: PatNetConfig, width: int, last: bool) -> None:
        super().__init__()
        convolved = width // config.n_div
        self.widths, self.last = [convolved, width - convolved], last
        self.partial_conv3 = nn.Conv2d(convolved, convolved, 3, 1, 1, bias=False)
        rest = width - convolved
        self.attn = _SelfAttention(rest, config.num_attention_heads) if last else _ChannelGate(rest)
        self.norm = _ChannelNorm(rest) if last else nn.BatchNorm2d(rest)

    def forward(self, maps: Tensor) -> Tensor:
        first, rest = maps.split(self.widths, 1)
        rest = self.attn(self.norm(rest)) if self.last else self.norm(self.attn(rest))
        return torch.cat([self.partial_conv3(first), rest], 1)


class _SpatialGate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv_attn, self.conv = nn.Conv2d(half, 1, 1, bias=False), nn.Conv2d(half, half, 1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(half), nn.BatchNorm2d(half)

    def forward(self, maps: Tensor) -> Tensor:
        gated, mixed = maps.chunk(2, 1)
        gated = self.norm(gated * (relu6(self.conv_attn(gated) + 3) / 6))
        return torch.cat([gated, self.conv(self.norm2(mixed))], 1)


class _Block(nn.Module):
    def __init__(self, config: PatNetConfig, width: int, last: bool) -> None:
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.spatial_mixing, self.last = _Partial(config, width, last), last
        act = nn.GELU() if config.hidden_act == "gelu" else nn.ReLU()
        mlp = [nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act]
        mlp += [nn.Conv2d(hidden, width, 1, bias=False), _SpatialGate(width)]
        self.mlp = nn.Sequential(*mlp)

    def forward(self, maps: Tensor) -> Tensor:
        if self.last:
            maps = maps + self.spatial_mixing(maps)
            return maps + self.mlp(maps)
        return maps + self.mlp(self.spatial_mixing(maps))


class _Stage(nn.Module):
    def __init__(self, config: PatNetConfig, stage: int) -> None:
        super().__init__()
        width, last = config.stage_channels[stage + 1], stage == 3
        self.blocks = nn.Sequential(*(_Block(config, width, last) for _ in range(config.depths[stage])))

    def forward(self, maps: Tensor) -> Tensor:
        return self.blocks(maps)


class _Merging(nn.Module):
    def __init__(self, name: str, before: int, after: int, side: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(before, after, side, side, bias=False))
        self.norm = nn.BatchNorm2d(after)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(getattr(self, self.name)(maps))


class Reference(nn.Module):
    """The classifier of a variant with spatial gates."""

    def __init__(self, config: PatNetConfig) -> None:
        super().__init__()
        widths = config.stage_channels[1:]
        self.patch_embed = _Merging("proj", 3, widths[0], 4)
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                stages.append(_Merging("reduction", width // 2, width, 2))
            stages.append(_Stage(config, stage))
        self.stages = nn.Sequential(*stages)
        act = nn.GELU() if config.hidden_act == "gelu" else nn.ReLU()
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(widths[-1], config.feature_dim, 1, bias=False), act]
        self.avgpool_pre_head = nn.Sequential(*pooled)
        self.head = nn.Linear(config.feature_dim, config.num_labels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.avgpool_pre_head(self.stages(self.patch_embed(maps))).flatten(1))
