"""Blocks of PATNet: partial attention (channel, self, spatial). Maps are `[B, C, H, W]`, names the official ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import hardsigmoid, linear

from hf_attn.models.patnet.configuration_patnet import PatNetConfig
from hf_attn.models.vision.attention import attend
from hf_attn.models.vision.layers import ChannelLayerNorm, fold_norm

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
        """`[heads, N, N]` for the N = height * width tokens of a map."""
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
        """`[B, C, H, W]` -> the same shape."""
        height, width = maps.shape[2:]
        tokens = maps.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.rpe_k(height, width)[None].to(tokens.dtype)
        out = attend(self, *qkv, scale=self.scale, bias=bias, dropout=self.config.attention_dropout)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out.transpose(1, 2).unflatten(2, (height, width))


class ChannelGate(nn.Module):
    """A gate for each channel from mean and standard deviation of all channels; `deploy`: its norm is folded."""

    def __init__(self, width: int, deploy: bool = False) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(width, width, (1, 2), bias=deploy)
        self.bn = nn.Identity() if deploy else nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Gates `[B, C, 1, 1]`; statistics in fp32, the deviation with N - 1. Raises ValueError for one position."""
        if maps.shape[2] * maps.shape[3] < 2:
            raise ValueError(f"a map of {tuple(maps.shape[2:])} has no standard deviation; give larger images")
        exact = maps.float() if maps.dtype != torch.float64 else maps
        mean = exact.mean((2, 3), keepdim=True)
        # torch.var and torch.std cost ten times as much on a CPU. The norm of 0 has gradient 0, as they have.
        deviation = vector_norm(exact - mean, dim=(2, 3)) / math.sqrt(maps.shape[2] * maps.shape[3] - 1)
        statistics = torch.cat([mean.flatten(1), deviation], 1).to(maps.dtype)
        weight = self.cfc1.weight.squeeze(2)
        gate = linear(statistics, torch.cat([weight[..., 0], weight[..., 1]], 1), self.cfc1.bias)[..., None, None]
        return hardsigmoid(self.bn(gate))

    def reparameterize(self) -> None:
        """Fold the norm into the convolution."""
        self.cfc1, self.bn = folded(self.cfc1, self.bn), nn.Identity()


class PartialAttention(nn.Module):
    """A 3x3 convolution of the first channels beside attention of the others.

    Args:
        kind: "channel" (gate, then batch norm), "self" (layer norm, then self-attention) or "none".

    With `config.deploy` the batch norm is a factor on the gate (`gain`); its shift is in the MLP that follows.
    """

    def __init__(self, config: PatNetConfig, width: int, kind: str) -> None:
        super().__init__()
        convolved = width // config.n_div
        self.widths, self.kind = [convolved, width - convolved], kind
        self.partial_conv3 = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)
        if kind == "channel":
            self.attn = ChannelGate(self.widths[1], config.deploy)
            if config.deploy:
                self.gain = nn.Parameter(torch.ones(self.widths[1], 1, 1))
            else:
                self.norm = nn.BatchNorm2d(self.widths[1])
        elif kind == "self":
            self.attn = SelfAttention(config, self.widths[1])
            self.norm = ChannelLayerNorm(self.widths[1])

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        first, rest = maps.split(self.widths, 1)
        if hasattr(self, "gain"):
            rest = rest * (self.attn(rest) * self.gain)
        elif self.kind == "channel":
            rest = self.norm(rest * self.attn(rest))
        elif self.kind == "self":
            rest = self.attn(self.norm(rest))
        return torch.cat([self.partial_conv3(first), rest], 1)

    @torch.no_grad()
    def take_norm(self) -> Tensor:
        """Turn the batch norm into `gain`, and return the shift `[width]` that is left for what follows."""
        scale, shift = affine(self.norm)
        self.gain = nn.Parameter(scale.to(self.norm.weight.dtype)[:, None, None])
        del self.norm
        return torch.cat([shift.new_zeros(self.widths[0]), shift])


class SpatialGate(nn.Module):
    """A gate for each position on one half of the channels, a 1x1 convolution of the other half.

    `deploy`: the convolution before it has taken over the norms and all convolutions, that of the gate as one more
    channel; what remains is the gate and `shift`.
    """

    def __init__(self, width: int, deploy: bool = False) -> None:
        super().__init__()
        half = width // 2
        self.widths = [width - half, half]
        if deploy:
            self.shift = nn.Parameter(torch.zeros(width - half, 1, 1))
            return
        self.conv_attn = nn.Conv2d(width - half, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width - half)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv = nn.Conv2d(half, half, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        if hasattr(self, "shift"):
            gated, mixed, gate = maps.split([*self.widths, 1], 1)
            if torch.is_grad_enabled():
                return torch.cat([torch.addcmul(self.shift, gated, hardsigmoid(gate)), mixed], 1)
            # In the place of the convolution's output, which nothing else reads.
            gated.mul_(hardsigmoid(gate)).add_(self.shift)
            return maps[:, :-1]
        gated, mixed = maps.split(self.widths, 1)
        gated = self.norm(gated * hardsigmoid(self.conv_attn(gated)))
        return torch.cat([gated, self.conv(self.norm2(mixed))], 1)

    @torch.no_grad()
    def fold_into(self, before: nn.Conv2d) -> nn.Conv2d:
        """The 1x1 convolution `before` with everything but the gate folded into it; this layer keeps `shift`."""
        weight = before.weight.double().flatten(1)
        gated, mixed = weight.split(self.widths)
        scale, shift = affine(self.norm)
        scale2, shift2 = affine(self.norm2)
        mix, gate = (layer.weight.double().flatten(1) for layer in (self.conv, self.conv_attn))
        rows = torch.cat([gated * scale[:, None], mix * scale2 @ mixed, gate @ gated])
        bias = torch.cat([torch.zeros_like(scale), mix @ shift2, shift.new_zeros(1)])
        self.shift = nn.Parameter(shift.to(before.weight.dtype)[:, None, None])
        del self.conv, self.conv_attn, self.norm, self.norm2
        return _convolution(rows[..., None, None], bias, before)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` of an evaluation-mode batch norm, fp64."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def folded(before: nn.Conv2d, norm: nn.BatchNorm2d, shift: Tensor | None = None) -> nn.Conv2d:
    """A convolution without a bias and the batch norm after it as one.

    Args:
        shift: `[C]`, added to the input of the convolution (a 1x1 one).
    """
    weight, bias = fold_norm(before.weight, None, norm)
    if shift is not None:
        bias = bias + (weight.double().flatten(1) @ shift).to(bias.dtype)
    return _convolution(weight, bias, before)


def _convolution(weight: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], like.kernel_size, like.stride, like.padding)
    made.weight = nn.Parameter(weight.to(like.weight.dtype))
    made.bias = nn.Parameter(bias.to(like.weight.dtype))
    return made.train(like.training)
