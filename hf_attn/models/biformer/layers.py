"""Token mixers of BiFormer. All take and return `[B, H, W, C]`; parameters have the official names."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from hf_attn.models.biformer.configuration_biformer import BiFormerConfig
from hf_attn.models.vision.attention import attend
from hf_attn.ops.bilevel import best_regions, bilevel_routing_attention

# Full attention has this many heads whatever its width.
FULL_HEADS = 8


def depthwise(width: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution that keeps the size of its map."""
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)


def _over_channels_last(layer: nn.Module, maps: Tensor) -> Tensor:
    """A layer of `[B, C, H, W]` on `[B, H, W, C]`."""
    return layer(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class QkvLinear(nn.Module):
    """Queries, keys and values of one linear layer; a module of its own because of the official name `qkv.qkv`."""

    def __init__(self, width: int, query_width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 2 * query_width + width)
        self.widths = [query_width, query_width, width]

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """`[..., C]` -> query, key and value `[..., widths]`."""
        return self.qkv(tokens).split(self.widths, -1)


class BilevelRoutingAttention(nn.Module):
    """Bi-level routing attention with local context enhancement, as in the released models (arXiv 2303.08810).

    Args:
        config: of the model; `n_win` or `region_size`, `auto_pad`, `side_dwconv`, `head_dim`, `qk_dims`, `topks`.
        stage: counts from 0.
    """

    def __init__(self, config: BiFormerConfig, stage: int) -> None:
        super().__init__()
        self.config = config
        width, query_width = config.embed_dims[stage], config.query_width(stage)
        self.num_heads, self.top_k = width // config.head_dim, config.topks[stage]
        # The width of all heads, not of one.
        self.scale = query_width**-0.5
        self.is_causal = False
        self._build(width, query_width)

    def _build(self, width: int, query_width: int) -> None:
        self.qkv = QkvLinear(width, query_width)
        self.wo = nn.Linear(width, width)
        if self.config.side_dwconv:
            self.lepe = depthwise(width, self.config.side_dwconv)

    def forward(self, maps: Tensor) -> Tensor:
        """Padding takes part: it is projected, read as keys, and cut off at the end.

        maps: `[B, H, W, C]`, and so is what it returns.
        """
        height, width = maps.shape[1:3]
        maps, region = self.to_whole_regions(maps)
        query, key, value = self.qkv(maps)
        out = self._attend(query, key, value, region)
        if hasattr(self, "lepe"):
            out = out + _over_channels_last(self.lepe, value)
        return self.wo(out)[:, :height, :width]

    def to_whole_regions(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The map with zeros below and to the right up to whole regions, and the size of a region.

        maps: `[B, H, W, C]`.
        """
        sides = maps.shape[1:3]
        region = self.region_of(*sides)
        if self.config.region_size:
            right, below = -sides[1] % region[1], -sides[0] % region[0]
        else:
            # To n_win whole regions, even where fewer would hold the map.
            below, right = (r * self.config.n_win - n for r, n in zip(region, sides, strict=True))
        return (pad(maps, (0, 0, 0, right, 0, below)) if below or right else maps), region

    def region_of(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of a region, after padding. Raises ValueError for sizes that do not divide, without `auto_pad`."""
        fixed, count = self.config.region_size, self.config.n_win
        divisor = fixed or count
        if not self.config.auto_pad and (height % divisor or width % divisor):
            what = f"region_size={fixed}" if fixed else f"n_win={count}"
            raise ValueError(
                f"a map of {height} x {width} does not divide by {what}; set auto_pad=True or resize the images"
            )
        return (fixed, fixed) if fixed else (-(-height // count), -(-width // count))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, region: tuple[int, int], routes: Tensor | None = None):
        parts = (t.unflatten(-1, (self.num_heads, -1)) for t in (query, key, value))
        # SDPA is what the op does by itself, without copies where they would be large.
        other = None if self.config._attn_implementation == "sdpa" else partial(attend, self)
        options = {"region_size": region, "top_k": self.top_k, "scale": self.scale, "routes": routes, "attend": other}
        return bilevel_routing_attention(*parts, **options).flatten(-2)


class BilevelRoutingAttentionNchw(BilevelRoutingAttention):
    """The authors' refactored form: sizes that do not divide give more and smaller regions, padded after projection.

    Equal to the other where sizes divide. Padded keys score 0 and are not masked.
    """

    def _build(self, width: int, query_width: int) -> None:
        self.widths = [query_width, query_width, width]
        self.qkv_linear = nn.Conv2d(width, sum(self.widths), 1)
        self.output_linear = nn.Conv2d(width, width, 1)
        if self.config.side_dwconv:
            self.lepe = depthwise(width, self.config.side_dwconv)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, H, W, C]` -> the same shape."""
        height, width = maps.shape[1:3]
        region = self.region_of(height, width)
        query, key, value = _over_channels_last(self.qkv_linear, maps).split(self.widths, -1)
        routes = self._routes(query, key, region)
        below, right = -height % region[0], -width % region[1]
        local = value
        if below or right:
            query, key, value = (pad(t, (0, 0, 0, right, 0, below)) for t in (query, key, value))
        out = self._attend(query, key, value, region, routes)[:, :height, :width]
        if hasattr(self, "lepe"):
            out = out + _over_channels_last(self.lepe, local)
        return _over_channels_last(self.output_linear, out)

    def region_of(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of a region. Raises ValueError for maps with fewer tokens a side than regions."""
        fixed, count = self.config.region_size, self.config.n_win
        if fixed:
            return fixed, fixed
        if min(height, width) < count:
            raise ValueError(f"a map of {height} x {width} has fewer tokens a side than n_win={count} regions")
        return height // count, width // count

    @torch.no_grad()
    def _routes(self, query: Tensor, key: Tensor, region: tuple[int, int]) -> Tensor:
        """Means over what a region has of the map, without padding."""
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        queries, keys = (
            avg_pool2d(t.permute(0, 3, 1, 2).to(exact), region, ceil_mode=True, count_include_pad=False).flatten(2).mT
            for t in (query, key)
        )
        return best_regions(queries, keys, self.top_k)


class FullAttention(nn.Module):
    """Attention of all tokens in 8 heads; `lepe` adds a depthwise convolution of the input, not of the values."""

    def __init__(self, config: BiFormerConfig, stage: int, lepe: bool) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dims[stage]
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.scale = (width // FULL_HEADS) ** -0.5
        self.is_causal = False
        if lepe and config.side_dwconv:
            self.lepe = depthwise(width, config.side_dwconv)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, H, W, C]` -> the same shape."""
        qkv = self.qkv(maps.flatten(1, 2)).unflatten(-1, (3, FULL_HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self, *qkv, scale=self.scale).transpose(1, 2).reshape(maps.shape)
        if hasattr(self, "lepe"):
            out = out + _over_channels_last(self.lepe, maps)
        return self.proj(out)


class ChannelsLast(nn.Module):
    """`[B, H, W, C]` to `[B, C, H, W]` or back; a place in the official order of modules."""

    def __init__(self, order: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, maps: Tensor) -> Tensor:
        """A map `[B, C, H, W]` or `[B, H, W, C]`, its axes in `order`."""
        return maps.permute(self.order)


def convolution_mixer(width: int) -> nn.Sequential:
    """Convolutions in the place of attention (`topks` 0)."""
    return nn.Sequential(
        ChannelsLast((0, 3, 1, 2)),
        nn.Conv2d(width, width, 1),
        depthwise(width, 5),
        nn.Conv2d(width, width, 1),
        ChannelsLast((0, 2, 3, 1)),
    )
