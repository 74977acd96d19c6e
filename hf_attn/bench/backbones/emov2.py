"""EMOv2 in the official order: close and remote windows one by one, written-out softmax, channels moved to last."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_attn.models.emov2.configuration_emov2 import EMOv2Config

PRESETS = ("1m", "5m")
_EPS = 1e-6


class _LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        last = maps.permute(0, 2, 3, 1).contiguous()
        return self.norm(last).permute(0, 3, 1, 2).contiguous()


class _ConvNormAct(nn.Module):
    def __init__(
        self,
        before: int,
        after: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = False,
        act: type[nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(after, eps=_EPS) if norm else nn.Identity()
        self.act = act()

    def forward(self, maps: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(maps)))


class _Conv(nn.Module):
    def __init__(self, width: int, middle: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.net = _ConvNormAct(width, middle, bias=True, act=act)

    def forward(self, maps: Tensor) -> Tensor:
        return self.net(maps)


class _Attention(nn.Module):
    def __init__(self, width: int, middle: int, act: type[nn.Module], head_dim: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale, self.window = width // head_dim, head_dim**-0.5, window
        self.qk = _ConvNormAct(width, 2 * width, bias=True)
        self.v = _ConvNormAct(width, middle, bias=True, act=act)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        side = self.window
        maps = pad(maps, (0, -width % side, 0, -height % side))
        query, key = self.qk(maps).chunk(2, 1)
        value = self.v(maps)
        close = self._attend(query, key, value, close=True)
        remote = self._attend(query, key, value, close=False)
        return (close + remote)[:, :, :height, :width].contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, close: bool) -> Tensor:
        batch, _, height, width = query.shape
        side, rows, columns = self.window, query.shape[2] // self.window, query.shape[3] // self.window
        space = (rows, side, columns, side) if close else (side, rows, side, columns)
        order = (0, 3, 5, 1, 4, 6, 2) if close else (0, 4, 6, 1, 3, 5, 2)

        def windows(states: Tensor) -> Tensor:
            split = states.view(batch, self.heads, -1, *space).permute(*order)
            return split.reshape(batch * rows * columns, self.heads, side * side, -1)

        weights = (windows(query) @ windows(key).mT * self.scale).softmax(-1)
        out = (weights @ windows(value)).view(batch, rows, columns, self.heads, side, side, -1)
        back = (0, 3, 6, 1, 4, 2, 5) if close else (0, 3, 6, 4, 1, 5, 2)
        return out.permute(*back).reshape(batch, -1, height, width)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Not the published 1e-6, which would hide every branch from the comparison of outputs.
        self.gamma = nn.Parameter(torch.rand(1, width, 1, 1) + 0.5)


class _Block(nn.Module):
    def __init__(self, config: EMOv2Config, stage: int, first: bool) -> None:
        super().__init__()
        after = config.embed_dims[stage]
        before = config.stage_channels[stage] if first else after
        middle = int(before * config.expand_ratios[stage] * (2 if first else 1))
        act = {"silu": nn.SiLU, "gelu": nn.GELU}[config.act[stage]]
        self.skip = not first
        layer_norm = config.norm_types[stage] == "ln"
        self.norm = _LayerNorm(before) if layer_norm else nn.BatchNorm2d(before, eps=_EPS)
        attention = not first and config.expand_ops[stage] == "hybrid"
        options = (config.head_dims[stage], config.window_sizes[stage])
        expansion = _Attention(before, middle, act, *options) if attention else _Conv(before, middle, act)
        self.eops = nn.ModuleList([expansion])
        kernel, stride = config.kernel_sizes[stage], 2 if first else 1
        self.conv_local = _ConvNormAct(middle, middle, kernel, stride, groups=middle, norm=True, act=nn.SiLU)
        self.proj = _ConvNormAct(middle, after)
        self.ls = _LayerScale(after)

    def forward(self, maps: Tensor) -> Tensor:
        wide = self.eops[0](self.norm(maps))
        local = self.conv_local(wide)
        out = self.proj(wide + local if self.skip else local) * self.ls.gamma
        return maps + out if self.skip else out


class Reference(nn.Module):
    """The classifier of a variant with "conv" and "hybrid" expansions."""

    def __init__(self, config: EMOv2Config) -> None:
        super().__init__()
        half = config.embed_dims[0] // 2
        self.stage0 = nn.Sequential(
            _ConvNormAct(3, half, 3, 2, bias=True, norm=True, act=nn.SiLU),
            _ConvNormAct(half, half, 3, groups=half, norm=True, act=nn.SiLU),
            _ConvNormAct(half, half),
        )
        for stage, depth in enumerate(config.depths):
            blocks = nn.Sequential(*(_Block(config, stage, first=index == 0) for index in range(depth)))
            self.add_module(f"stage{stage + 1}", blocks)
        self.norm = _LayerNorm(config.embed_dims[-1])
        self.head = nn.Linear(config.embed_dims[-1], config.num_labels)

    def forward(self, maps: Tensor) -> Tensor:
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            maps = stage(maps)
        return self.head(self.norm(maps).mean((2, 3)))
