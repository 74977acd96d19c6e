"""The LaMamba block: a four-way selective scan, window attention and an MLP, each modulated by the condition."""

from __future__ import annotations

import math

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from hf_attn.integrations.hub.scan_kernels import scan_of
from hf_attn.models.lamamba_diff.paths import PATHS, along, collect, spread

MIXERS = {"both": ("scan", "attention"), "scan": ("scan",), "attention": ("attention",)}


class SelectiveScan2D(nn.Module):
    """VMamba's SS2D (v2) on four paths over a square map.

    Args:
        dim: channels C.
        state_size: n.
        ratio: the scan is int(ratio * C) channels wide.
        kernel_size: of the depthwise convolution, odd.
        continuous: snake paths, or raster ones.
        backend: see `hf_attn.integrations.hub.scan_kernels.scan_of`.
    """

    def __init__(
        self, dim: int, state_size: int, ratio: float, kernel_size: int, continuous: bool, backend: str
    ) -> None:
        super().__init__()
        inner, self.rank = int(ratio * dim), math.ceil(dim / 16)
        self.state_size, self.continuous, self.scan = state_size, continuous, scan_of(backend)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=False)
        self.x_proj = nn.Parameter(torch.empty(PATHS, self.rank + 2 * state_size, inner))
        self.dt_proj = nn.Parameter(torch.empty(PATHS, inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(PATHS, inner))
        self.A_log = nn.Parameter(torch.empty(PATHS, inner, state_size))
        self.D = nn.Parameter(torch.empty(PATHS, inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_scan()

    @torch.no_grad()
    def reset_scan(self) -> None:
        """Initial values of the parameters of the scan: states that forget at rates 1..n times 0.001 to 0.1 a step."""
        for weight in (self.x_proj, self.dt_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        step = (torch.rand_like(self.dt_bias) * math.log(100)).exp().mul_(1e-3).clamp_(min=1e-4)
        self.dt_bias.copy_(step + (-torch.expm1(-step)).log())
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, N, N, C]`"""
        side = x.shape[1]
        features, gate = self.in_proj(x).chunk(2, -1)
        features = silu(self.conv(features.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        # What a token says about step size, input and output does not depend on the order, only on the path.
        maps = (features @ self.x_proj.flatten(0, 1).mT).unflatten(2, (PATHS, -1))
        maps = along(maps, side, self.continuous)
        rank, inputs, outputs = maps.split([self.rank, self.state_size, self.state_size], -1)
        y = self.scan(
            spread(features, side, self.continuous),
            rank @ self.dt_proj.mT,
            -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float()),
            inputs,
            outputs,
            self.D,
            delta_bias=self.dt_bias,
            delta_softplus=True,
        )
        y = collect(y, side, self.continuous).unflatten(1, (side, side))
        return self.out_proj(self.norm(y) * silu(gate))


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias by relative position, the windows shifted or not (Swin).

    Args:
        dim: channels.
        heads: attention heads; divide dim.
        window: side of a window, and what the bias table is made for.
        shift: rows and columns the windows are shifted by; 0 for none.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, N, N, C]`; raises ValueError when the windows do not tile the map."""
        batch, side = x.shape[:2]
        window, shift = (side, 0) if side <= self.window else (self.window, self.shift)
        if side % window:
            raise ValueError(
                f"a feature map of side {side} cannot be cut into windows of {window}; choose a sample size whose "
                f"stages are multiples of window_size, or at most as large"
            )
        count = (side // window) ** 2
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        tiles = self.qkv(x).view(batch, side // window, window, side // window, window, 3, self.heads, -1)
        # Windows count as heads, so that one bias [windows * heads, S, S] serves the whole batch.
        tiles = tiles.permute(5, 0, 2, 4, 1, 3, 6, 7).reshape(3, batch, window**2, count * self.heads, -1)
        bias = self._bias(window).expand(count, -1, -1, -1)
        if shift:
            bias = bias + _border(side, window, shift, x.device).to(bias.dtype)[:, None]
        out = dispatch_attention_fn(*tiles.unbind(0), attn_mask=bias.flatten(0, 1)[None].to(x.dtype))
        out = out.reshape(batch, window, window, side // window, side // window, -1).permute(0, 3, 1, 4, 2, 5)
        out = self.proj(out.reshape(batch, side, side, -1))
        return out.roll((shift, shift), (1, 2)) if shift else out

    def _bias(self, window: int) -> Tensor:
        """`[heads, S, S]`, query minus key; smaller windows read the table around its centre."""
        place = torch.arange(window, device=self.rel_bias.device)
        distance = place[:, None] - place[None, :] + self.window - 1
        index = distance[:, None, :, None] * (2 * self.window - 1) + distance[None, :, None, :]
        return self.rel_bias[index.reshape(window**2, window**2)].permute(2, 0, 1)


def _border(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """-100 between positions that only the roll brought together, `[windows, S, S]`."""
    place = torch.arange(side, device=device)
    band = (place >= side - window).int() + (place >= side - shift).int()
    region = (3 * band[:, None] + band[None, :]).view(side // window, window, side // window, window)
    region = region.transpose(1, 2).reshape(-1, window**2)
    return (region[:, :, None] != region[:, None, :]) * -100.0


class FeedForward(nn.Module):
    """C -> ratio * C, exact GELU, -> C."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., C]`"""
        return self.fc2(gelu(self.fc1(x)))


class LaMambaBlock(nn.Module):
    """x += gate * layer(LN(x) * (1 + scale) + shift), for the scan, the window attention and the MLP.

    Args:
        dim, cond_dim: channels of the map and of the condition.
        heads, window, shift: see `WindowAttention`.
        state_size, ssm_ratio, conv, continuous, backend: see `SelectiveScan2D`.
        mlp_ratio: see `FeedForward`.
        project: map the condition to `dim` channels even where it has as many.
        mixers: "both", "scan" or "attention"; the layer that is left out has no weights.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        *,
        heads: int,
        window: int,
        shift: int = 0,
        state_size: int = 16,
        ssm_ratio: float = 2.0,
        conv: int = 3,
        mlp_ratio: float = 4.0,
        continuous: bool = True,
        backend: str = "auto",
        project: bool = False,
        mixers: str = "both",
    ) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(cond_dim, dim) if project or cond_dim != dim else nn.Identity()
        self.scans, self.attends = ("scan" in MIXERS[mixers], "attention" in MIXERS[mixers])
        self.parts = 3 * (self.scans + self.attends + 1)
        self.modulation = nn.Linear(dim, self.parts * dim)
        if self.scans:
            self.norm_ssm = nn.LayerNorm(dim)
            self.ssm = SelectiveScan2D(dim, state_size, ssm_ratio, conv, continuous, backend)
        if self.attends:
            self.norm_attn = nn.LayerNorm(dim)
            self.attn = WindowAttention(dim, heads, window, shift)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, mlp_ratio)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x `[B, N, N, C]`, cond `[B, cond_dim]`"""
        signals = self.modulation(silu(self.cond_proj(cond)))[:, None, None].chunk(self.parts, -1)
        layers: list[tuple[nn.Module, nn.Module]] = [(self.norm_ssm, self.ssm)] if self.scans else []
        layers += [(self.norm_attn, self.attn)] if self.attends else []
        for number, (norm, layer) in enumerate([*layers, (self.norm_mlp, self.mlp)]):
            shift, scale, gate = signals[3 * number : 3 * number + 3]
            x = x + gate * layer(norm(x) * (1 + scale) + shift)
        return x
