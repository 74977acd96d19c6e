"""OverLoCK in the official order: every branch of a large kernel, affinities to 49 cells mapped to window weights.

The authors aggregate with natten's `na2d_av`, which needs a compiler and is gone from current releases; here the values
of every window are gathered, as a version without natten has to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from hf_attn.models.overlock.configuration_overlock import OverlockConfig
from hf_attn.models.overlock.reparam import BRANCHES

PRESETS = ("xt",)


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class _ResidualConv(nn.Conv2d):
    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + super().forward(maps)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width, 1, 1, 1)), nn.Parameter(torch.zeros(width))

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.conv2d(maps, self.weight, self.bias, groups=maps.shape[1])


class _Grn(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(0.1 * torch.randn(1, width, 1, 1)) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        size = maps.norm(p=2, dim=(2, 3), keepdim=True)
        share = size / (size.mean(1, keepdim=True) + 1e-6)
        return (self.gamma * share + 1) * maps + self.beta


class _Excitation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(16, width // 8)
        layers = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), nn.GELU(), nn.Conv2d(inner, width, 1)]
        self.proj = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.proj(maps)


class _LargeKernel(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.names = [f"k{size}_{dilation}" for size, dilation in BRANCHES[kernel]]
        self.lk_origin = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.origin_bn = nn.BatchNorm2d(width)
        for name, (size, dilation) in zip(self.names, BRANCHES[kernel], strict=True):
            padding, options = dilation * (size - 1) // 2, {"groups": width, "bias": False}
            conv = nn.Conv2d(width, width, size, padding=padding, dilation=dilation, **options)
            self.add_module(f"dil_conv_{name}", conv)
            self.add_module(f"dil_bn_{name}", nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(maps))
        for name in self.names:
            out = out + getattr(self, f"dil_bn_{name}")(getattr(self, f"dil_conv_{name}")(maps))
        return out


def _conv_norm(before: int, after: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


def _mlp(width: int, hidden: int) -> list[nn.Module]:
    return [nn.Conv2d(width, hidden, 1), nn.GELU(), _ResidualConv(hidden), _Grn(hidden), nn.Conv2d(hidden, width, 1)]


class _Static(nn.Module):
    def __init__(self, config: OverlockConfig, stage: int) -> None:
        super().__init__()
        width, value = config.embed_dims[stage], config.ls_init_values[stage]
        self.dwconv = _ResidualConv(width)
        mixing = [_LayerNorm(width), _LargeKernel(width, config.kernel_sizes[stage]), nn.BatchNorm2d(width)]
        mlp = _mlp(width, int(width * config.mlp_ratios[stage]))
        self.proj = nn.Sequential(*mixing, _Excitation(width), *mlp)
        self.ls = nn.Identity() if value is None else _LayerScale(width)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.dwconv(maps)
        return self.ls(maps) + self.proj(maps)


def gathered_windows(values: Tensor, kernel: int) -> Tensor:
    """`[B, g, c, H, W]` -> values of every query's window, `[B, g, c, H, W, K * K]`, all of them written out."""
    rows, columns = (
        (torch.arange(size) - kernel // 2).clamp(0, size - kernel)[:, None] + torch.arange(kernel)
        for size in values.shape[3:]
    )
    return values[..., rows[:, None, :, None], columns[None, :, None, :]].flatten(-2)


def gathered_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias of every query's window, `[g, H, W, K * K]`."""
    kernel = (table.shape[1] + 1) // 2
    rows, columns = (
        (torch.arange(n) - kernel // 2).clamp(0, n - kernel)[:, None] + torch.arange(kernel) - torch.arange(n)[:, None]
        for n in (height, width)
    )
    return table[:, rows[:, None, :, None] + kernel - 1, columns[None, :, None, :] + kernel - 1].flatten(-2)


class _Dynamic(nn.Module):
    def __init__(self, config: OverlockConfig, stage: int, first: bool) -> None:
        super().__init__()
        dim, context, part = config.embed_dims[stage], config.context_dim, stage - 2
        both, self.kernel, self.small = dim + context, config.kernel_sizes[stage], config.smk_size
        self.split, self.heads = [dim, context], 2 * config.sub_num_heads[part]
        self.scale = (dim // self.heads) ** -0.5
        self.first = first
        if not first:
            self.x_scale, self.h_scale = _LayerScale(context), _LayerScale(context)
        self.dwconv1, self.norm1 = _ResidualConv(both), _LayerNorm(both)
        fusion = [nn.Conv2d(both, both, 3, padding=1, groups=both), nn.BatchNorm2d(both), nn.GELU()]
        self.fusion = nn.Sequential(*fusion, nn.Conv2d(both, dim, 1), _Grn(dim))
        self.weight_query = _conv_norm(dim, dim // 2)
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(7), *_conv_norm(context, dim // 2))
        self.weight_proj = nn.Conv2d(49, self.small**2 + self.kernel**2, 1)
        sides = (2 * self.small - 1, 2 * self.kernel - 1)
        self.rpb1, self.rpb2 = (nn.Parameter(0.5 * torch.randn(self.heads, side, side)) for side in sides)
        self.dyconv_proj = _conv_norm(dim, dim)
        self.lepe = nn.Sequential(_LargeKernel(dim, self.kernel), nn.BatchNorm2d(dim))
        self.se_layer = _Excitation(dim)
        self.gate = nn.Sequential(*_conv_norm(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, both, 1))
        self.dwconv2, self.norm2 = _ResidualConv(both), _LayerNorm(both)
        self.mlp = nn.Sequential(*_mlp(both, int(dim * config.sub_mlp_ratios[part])))
        self.ls1, self.ls2 = _LayerScale(both), _LayerScale(both)

    def forward(self, maps: Tensor, context: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        if not self.first:
            context = self.x_scale(context) + self.h_scale(original)
        maps = self.dwconv1(torch.cat([maps, context], 1))
        skip, normed = maps, self.norm1(maps)
        values = self.fusion(normed)
        gate, lepe = self.gate(values), self.lepe(values)
        mixed = self.dyconv_proj(self._mix(*normed.split(self.split, 1), values)) + lepe
        maps = self.ls1(skip) + self.proj(gate * self.se_layer(mixed))
        maps = self.dwconv2(maps)
        maps = self.ls2(maps) + self.mlp(self.norm2(maps))
        return maps.split(self.split, 1)

    def _mix(self, query_maps: Tensor, key_maps: Tensor, values: Tensor) -> Tensor:
        size = values.shape[2:]
        if min(size) < self.kernel:
            if size[0] < size[1]:
                working = (self.kernel, int(self.kernel / size[0] * size[1]))
            else:
                working = (int(self.kernel / size[1] * size[0]), self.kernel)
            query_maps, values, key_maps = (
                interpolate(x, working, mode="bilinear", align_corners=False) for x in (query_maps, values, key_maps)
            )
        batch, _, height, width = values.shape
        query = self.weight_query(query_maps).view(batch, self.heads, -1, height * width) * self.scale
        key = self.weight_key(key_maps).view(batch, self.heads, -1, 49)
        affinity = torch.einsum("bgcn,bgcl->blgn", query, key).contiguous()
        weights = self.weight_proj(affinity).permute(0, 2, 3, 1).unflatten(2, (height, width)).contiguous()
        parts = weights.split([self.small**2, self.kernel**2], -1)
        halves = values.view(batch, 2, self.heads, -1, height, width).unbind(1)
        out = []
        for part, table, half, kernel in zip(
            parts, (self.rpb1, self.rpb2), halves, (self.small, self.kernel), strict=True
        ):
            attention = (part + gathered_bias(table, height, width)).softmax(-1)
            out.append((gathered_windows(half, kernel) * attention[:, :, None]).sum(-1).flatten(1, 2))
        mixed = torch.cat(out, 1)
        return mixed if (height, width) == size else adaptive_avg_pool2d(mixed, size)


class Reference(nn.Module):
    """The classifier of a variant with `res_scale`, in evaluation, with the second head beside it."""

    def __init__(self, config: OverlockConfig) -> None:
        super().__init__()
        dims, context = config.embed_dims, config.context_dim
        half, stem = dims[0] // 2, []
        for before, after, stride in ((3, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)):
            stem += [*_conv_norm(before, after, 3, stride), nn.GELU()]
        self.patch_embed1 = nn.Sequential(*stem[:-1])
        for stage in range(4):
            if stage:
                self.add_module(f"patch_embed{stage + 1}", _conv_norm(dims[stage - 1], dims[stage], 3, 2))
            blocks = nn.Sequential(*(_Static(config, stage) for _ in range(config.depths[stage])))
            self.add_module(f"blocks{stage + 1}", blocks)
        self.high_level_proj = nn.Conv2d(dims[3], context, 1)
        self.patch_embedx = nn.ModuleDict(
            {"x_proj": _conv_norm(dims[2], dims[3], 3, 2), "h_proj": _conv_norm(context, context, 3, 2)}
        )
        self.sub_blocks3, self.sub_blocks4 = (
            nn.ModuleList([_Dynamic(config, stage, first=stage == 2 and index == 0) for index in range(depth)])
            for stage, depth in zip((2, 3), config.sub_depths, strict=True)
        )
        width = config.projection_dim
        head = [*_conv_norm(dims[3] + context, width), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
        self.head = nn.Sequential(*head, nn.Conv2d(width, config.num_labels, 1))
        pooling = [nn.BatchNorm2d(dims[3]), nn.AdaptiveAvgPool2d(1)]
        self.aux_head = nn.Sequential(*pooling, nn.Conv2d(dims[3], config.num_labels, 1))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.blocks1(self.patch_embed1(maps))
        maps = self.blocks2(self.patch_embed2(maps))
        maps = self.blocks3(self.patch_embed3(maps))
        coarse = self.high_level_proj(self.blocks4(self.patch_embed4(maps)))
        original = interpolate(coarse, maps.shape[2:], mode="bilinear", align_corners=False)
        context = original
        for block in self.sub_blocks3:
            maps, context = block(maps, context, original)
        maps, context = self.patch_embedx["x_proj"](maps), self.patch_embedx["h_proj"](context)
        for block in self.sub_blocks4:
            maps, context = block(maps, context, coarse)
        return self.head(torch.cat([maps, context], 1)).flatten(1)
