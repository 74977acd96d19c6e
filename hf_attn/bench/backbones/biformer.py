"""BiFormer in the official order: regions side by side, keys copied by an expanded gather, written-out softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attn.models.biformer.configuration_biformer import BiFormerConfig

PRESETS = ("tiny",)


class _Qkv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.qkv(tokens).split([self.width, 2 * self.width], -1)


class _Routed(nn.Module):
    def __init__(self, config: BiFormerConfig, stage: int) -> None:
        super().__init__()
        width = config.embed_dims[stage]
        self.heads, self.regions, self.top_k = width // config.head_dim, config.n_win, config.topks[stage]
        self.scale = width**-0.5
        self.qkv, self.wo = _Qkv(width), nn.Linear(width, width)
        self.lepe = nn.Conv2d(width, width, 5, padding=2, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        side = self.regions
        rows, columns = height // side, width // side
        split = maps.view(batch, side, rows, side, columns, channels).transpose(2, 3)
        query, both = self.qkv(split.reshape(batch, side * side, rows, columns, channels))
        query_tokens, both_tokens = query.flatten(2, 3), both.flatten(2, 3)
        query_mean, key_mean = query.mean((2, 3)), both[..., :channels].mean((2, 3))
        values = both[..., channels:].view(batch, side, side, rows, columns, channels)
        values = values.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width).contiguous()
        lepe = self.lepe(values).permute(0, 2, 3, 1)

        logits = query_mean.detach() * self.scale @ key_mean.detach().mT
        index = logits.topk(self.top_k, -1).indices
        count, tokens = side * side, rows * columns
        chosen = torch.gather(
            both_tokens.view(batch, 1, count, tokens, -1).expand(-1, count, -1, -1, -1),
            2,
            index.view(batch, count, self.top_k, 1, 1).expand(-1, -1, -1, tokens, both_tokens.shape[-1]),
        )
        key, value = chosen.split([channels, channels], -1)

        def heads(states: Tensor) -> Tensor:
            return states.reshape(batch * count, -1, self.heads, channels // self.heads).transpose(1, 2)

        weights = (heads(query_tokens) * self.scale @ heads(key).mT).softmax(-1)
        out = (weights @ heads(value)).transpose(1, 2).reshape(batch, side, side, rows, columns, channels)
        out = out.transpose(2, 3).reshape(batch, height, width, channels)
        return self.wo(out + lepe)


class _Full(nn.Module):
    def __init__(self, config: BiFormerConfig, stage: int) -> None:
        super().__init__()
        width = config.embed_dims[stage]
        self.heads, self.scale = 8, (width // 8) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.lepe = nn.Conv2d(width, width, 5, padding=2, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        lepe = self.lepe(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qkv = self.qkv(maps.reshape(batch, height * width, channels))
        query, key, value = qkv.reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query * self.scale @ key.mT).softmax(-1)
        out = (weights @ value).transpose(1, 2).reshape(batch, height, width, channels)
        return self.proj(out + lepe)


class _Block(nn.Module):
    def __init__(self, config: BiFormerConfig, stage: int) -> None:
        super().__init__()
        width, hidden = config.embed_dims[stage], int(config.mlp_ratios[stage] * config.embed_dims[stage])
        self.pos_embed = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = (_Routed if config.topks[stage] > 0 else _Full)(config, stage)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps + self.pos_embed(maps)
        maps = maps.permute(0, 2, 3, 1)
        maps = maps + self.attn(self.norm1(maps))
        maps = maps + self.mlp(self.norm2(maps))
        return maps.permute(0, 3, 1, 2)


class Reference(nn.Module):
    """The classifier of a variant with the "conv" stem, for maps that divide by `n_win`."""

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__()
        widths = config.embed_dims
        half = widths[0] // 2
        stem = [nn.Conv2d(3, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU()]
        stem += [nn.Conv2d(half, widths[0], 3, 2, 1), nn.BatchNorm2d(widths[0])]
        merging = [
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after))
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem), *merging])
        self.stages = nn.ModuleList(
            [nn.Sequential(*(_Block(config, stage) for _ in range(depth))) for stage, depth in enumerate(config.depths)]
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], config.num_labels)

    def forward(self, maps: Tensor) -> Tensor:
        for downsampling, stage in zip(self.downsample_layers, self.stages, strict=True):
            maps = stage(downsampling(maps))
        return self.head(self.norm(maps).flatten(2).mean(-1))
