"""Context-mixing dynamic convolution: window weights from affinities to a pooled context (arXiv 2502.20087)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.models.overlock.layers import (
    OverlockGrn,
    OverlockLayerScale,
    OverlockResidualConv,
    OverlockSqueezeExcitation,
    conv_norm,
    layer_scale,
    mlp,
    residual,
)
from hf_attn.models.overlock.mixing import Backend, mix_windows, window_bias
from hf_attn.models.overlock.reparam import OverlockDilatedReparam, check_kernel
from hf_attn.models.vision.layers import ChannelLayerNorm, DropPath

# The context is pooled to a map of this many rows and columns.
POOLED = 7


class OverlockMixer(GradientCheckpointingLayer):
    """What both dynamic blocks share: weights from queries and pooled keys, and their aggregation in two windows.

    A base class, so that parameters keep their published names. Half of the value channels is mixed in a window of
    `small` rows and columns, the other half in one of `kernel`.
    """

    def _build_mixer(self, dim: int, context: int, kernel: int, small: int, num_heads: int, backend: Backend) -> None:
        check_kernel("kernel", kernel)
        check_channels(dim, num_heads)
        if small % 2 == 0 or not 3 <= small <= kernel:
            raise ValueError(f"small_kernel={small} must be odd, from 3 to kernel={kernel}")
        self.kernel, self.small, self.heads = kernel, small, 2 * num_heads
        self.scale, self.backend = (dim // self.heads) ** -0.5, backend
        self.weight_query = conv_norm(dim, dim // 2)
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(POOLED), *conv_norm(context, dim // 2))
        self.weight_proj = nn.Conv2d(POOLED**2, small**2 + kernel**2, 1)
        self.rpb1 = nn.Parameter(torch.zeros(self.heads, 2 * small - 1, 2 * small - 1))
        self.rpb2 = nn.Parameter(torch.zeros(self.heads, 2 * kernel - 1, 2 * kernel - 1))

    def mix(self, query_source: Tensor, key_source: Tensor, values: Tensor) -> Tensor:
        """Aggregate `values` `[B, C, H, W]` with weights predicted from maps of the same size.

        Maps with a side below the kernel are enlarged until the shorter one is the kernel, see `working_size`; the
        result is pooled back.
        """
        height, width = values.shape[2:]
        # Keys are pooled from the source as the dynamic part sees it, enlarged or not.
        if min(height, width) < self.kernel:
            size = working_size(height, width, self.kernel)
            query_source, key_source, values = (
                interpolate(x, size, mode="bilinear", align_corners=False) for x in (query_source, key_source, values)
            )
        mixed = self._mix(self.weight_query(query_source), self.weight_key(key_source), self.project_values(values))
        return mixed if mixed.shape[2:] == (height, width) else adaptive_avg_pool2d(mixed, (height, width))

    def project_values(self, values: Tensor) -> Tensor:
        """What is mixed, from the map `mix` is given.

        values: `[B, C, H, W]`, and so is what it returns.
        """
        return values

    def _mix(self, query: Tensor, key: Tensor, values: Tensor) -> Tensor:
        batch, _, height, width = values.shape
        small, heads = self.small**2, self.heads
        query = query.flatten(2).unflatten(1, (heads, -1)).mT * self.scale
        key = key.flatten(2).unflatten(1, (heads, -1))
        # The linear map over the 49 affinities is applied to the keys: the same sum, over C / (2 g) channels a query.
        table = key @ self.weight_proj.weight.flatten(1).mT
        logits = torch.matmul(query, table) + self.weight_proj.bias
        logits = logits.unflatten(2, (height, width))
        halves = values.unflatten(1, (2, heads, -1)).permute(1, 0, 2, 4, 5, 3)
        out = []
        for part, side, bias, half in (
            (logits[..., :small], self.small, self.rpb1, halves[0]),
            (logits[..., small:], self.kernel, self.rpb2, halves[1]),
        ):
            weights = (part + window_bias(bias, height, width).flatten(3)).softmax(-1)
            out.append(mix_windows(weights.to(half.dtype), half, side, self.backend).permute(0, 1, 4, 2, 3))
        return torch.stack(out, 1).reshape(batch, -1, height, width)


def working_size(height: int, width: int, kernel: int) -> tuple[int, int]:
    """Size at which a map below the kernel is mixed: the shorter side = kernel, the other in proportion, truncated."""
    if height < width:
        return kernel, int(kernel / height * width)
    if width < height:
        return int(kernel / width * height), kernel
    return kernel, kernel


def check_channels(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `dim` channels split into two halves of 2 * num_heads heads."""
    if num_heads < 1 or dim % (4 * num_heads):
        raise ValueError(
            f"dim={dim} must be a multiple of 4 * num_heads = {4 * num_heads} (two halves of 2 x heads each)"
        )


class OverlockDynamicBlock(OverlockMixer):
    """Block of Focus-Net: dynamic convolution, gated, whose weights read a context that flows along.

    Args:
        dim: channels of the map.
        context: channels of the context.
        kernel, small_kernel: the two windows.
        num_heads: half the number of heads.
        mlp_ratio: channels in the middle of the MLP over `dim`.
        ls_init_value, res_scale, drop_path, deploy: as in OverlockRepConvBlock.
        is_first: the context comes straight from Overview-Net and is not mixed with itself.
        is_last: return map and context as one tensor.
        backend: how window weights are applied, see `mix_windows`.
    """

    def __init__(
        self,
        dim: int,
        context: int,
        *,
        kernel: int,
        small_kernel: int = 5,
        num_heads: int = 1,
        mlp_ratio: float = 4,
        ls_init_value: float | None = 1.0,
        res_scale: bool = True,
        drop_path: float = 0.0,
        deploy: bool = False,
        is_first: bool = False,
        is_last: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        both = dim + context
        self.dim, self.context, self.res_scale = dim, context, res_scale
        self.is_first, self.is_last = is_first, is_last
        if not is_first:
            self.x_scale, self.h_scale = OverlockLayerScale(context), OverlockLayerScale(context)
        self.dwconv1 = OverlockResidualConv(both)
        self.norm1 = ChannelLayerNorm(both)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, dim, 1),
            OverlockGrn(dim),
        )
        self._build_mixer(dim, context, kernel, small_kernel, num_heads, backend)
        self.dyconv_proj = conv_norm(dim, dim)
        self.lepe = nn.Sequential(OverlockDilatedReparam(dim, kernel, deploy), nn.BatchNorm2d(dim))
        self.se_layer = OverlockSqueezeExcitation(dim)
        self.gate = nn.Sequential(*conv_norm(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, both, 1))
        self.dwconv2 = OverlockResidualConv(both)
        self.norm2 = ChannelLayerNorm(both)
        self.mlp = mlp(both, int(dim * mlp_ratio))
        self.ls1, self.ls2 = layer_scale(both, ls_init_value), layer_scale(both, ls_init_value)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, context: Tensor, overview: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Map `[B, dim, H, W]`, running and original context `[B, context, H, W]` -> map and context.

        The last block of the net returns `[B, dim + context, H, W]`.
        """
        if not self.is_first:
            context = self.x_scale(context) + self.h_scale(overview)
        skip = self.dwconv1(torch.cat([hidden, context], 1))
        normed = self.norm1(skip)
        values = self.fusion(normed)
        gate, lepe = self.gate(values), self.lepe(values)
        mixed = self.mix(normed[:, : self.dim], normed[:, self.dim :], values)
        mixed = self.se_layer(self.dyconv_proj(mixed) + lepe)
        out = residual(skip, self.proj(gate * mixed), self.ls1, self.drop_path, self.res_scale)
        out = self.dwconv2(out)
        out = residual(out, self.mlp(self.norm2(out)), self.ls2, self.drop_path, self.res_scale)
        return out if self.is_last else out.split([self.dim, self.context], 1)


class ContMixBlock(OverlockMixer):
    """Plug-in form of the dynamic block: no context flow, `[B, dim, H, W]` to the same shape.

    Args: as in OverlockDynamicBlock.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel: int = 7,
        small_kernel: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        ls_init_value: float | None = None,
        res_scale: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.dwconv1 = OverlockResidualConv(dim)
        self.norm1 = ChannelLayerNorm(dim)
        self._build_mixer(dim, dim, kernel, small_kernel, num_heads, backend)
        for table in (self.rpb1, self.rpb2):
            nn.init.trunc_normal_(table, std=0.02)
        self.weight_value = conv_norm(dim, dim)
        self.fusion_proj = conv_norm(dim, dim)
        self.lepe = nn.Sequential(OverlockDilatedReparam(dim, kernel, deploy), nn.BatchNorm2d(dim))
        self.se_layer = OverlockSqueezeExcitation(dim)
        self.gate = nn.Sequential(*conv_norm(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))
        self.dwconv2 = OverlockResidualConv(dim)
        self.norm2 = ChannelLayerNorm(dim)
        self.mlp = mlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = layer_scale(dim, ls_init_value), layer_scale(dim, ls_init_value)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> the same shape."""
        skip = self.dwconv1(hidden)
        normed = self.norm1(skip)
        gate, lepe = self.gate(normed), self.lepe(normed)
        mixed = self.mix(normed, normed, normed)
        mixed = self.se_layer(self.fusion_proj(mixed) + lepe)
        out = residual(skip, self.proj(gate * mixed), self.ls1, self.drop_path, self.res_scale)
        out = self.dwconv2(out)
        return residual(out, self.mlp(self.norm2(out)), self.ls2, self.drop_path, self.res_scale)

    def project_values(self, values: Tensor) -> Tensor:
        """As in the mixer, by a 1x1 convolution."""
        return self.weight_value(values)
