"""LaMamba-Diff (arXiv 2408.02615): the denoiser, a U-Net with patches of one pixel over scans and windows."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm, silu

from hf_attn.checks import require_int
from hf_attn.integrations.hub.scan_kernels import BACKENDS
from hf_attn.models.lamamba_diff.layers import MIXERS, LaMambaBlock, SelectiveScan2D, WindowAttention

# Channels of the four stages over the base channels, and how often a stage has halved the sides.
WIDTHS = (1, 2, 4, 4)
HALVINGS = (0, 1, 2, 2)
TIME_CHANNELS = 256
FINAL_EPS = 1e-6

# Keyword arguments by name; sides are those of 256-pixel images (sample_size 32). "XL-n1" is the released config file,
# "XL-figure" the paper's figure, both read with the widths of XL; S, B and L are sized like the DiT of that letter.
VARIANTS: dict[str, dict[str, Any]] = {
    "S": {"base_channels": 72, "num_heads": 4},
    "B": {"base_channels": 144, "num_heads": 8},
    "L": {"base_channels": 272, "num_heads": 16},
    "XL": {"base_channels": 320, "num_heads": 16},
    "XL-n1": {"base_channels": 320, "num_heads": 16, "ssm_state_size": 1},
    "XL-figure": {
        "base_channels": 320, "num_heads": 16, "ssm_state_size": 1, "depths": [2, 2, 2, 0], "bottleneck_depth": 1,
    },
}  # fmt: skip


class LaMambaDiffTransformer2DModel(ModelMixin, ConfigMixin):
    """Class-conditional denoiser whose cost grows linearly with the number of latent positions.

    Drops into `DiTPipeline`, and into `LaMambaDiffPipeline` for another number of classes or without a VAE.

    Args:
        sample_size: side N of the latents that windows and position table are made for; a multiple of 8.
        in_channels: of the latents (or of the image, in pixel space).
        out_channels: in_channels (noise only) or twice as many (noise, then variance).
        num_classes: without the null class, whose label is num_classes; 0 for an unconditional model.
        base_channels: width d of the first stage, a multiple of 4; the stages have d, 2d, 4d, 4d.
        depths: blocks of the four encoder stages; decoder stages have one more each.
        bottleneck_depth: blocks between encoder and decoder.
        num_heads: attention heads of every stage; divides base_channels.
        window_size: side of an attention window; stages that are smaller attend to all of themselves.
        ssm_state_size: n of the scans; 16 gives the published cost, the released config says 1.
        ssm_ratio: channels of a scan over channels of its stage.
        ssm_conv: side of the depthwise convolution before a scan; odd.
        mlp_ratio: hidden channels of the MLP over channels of its stage.
        continuous_scan: snake paths; false scans rows and columns from their start each time.
        class_dropout_prob: share of the labels that training replaces by the null class.
        scan_backend: "auto", "torch", "mamba_ssm" or "hub", see `hf_attn.integrations.hub.scan_kernels.scan_of`.
        mixers: "both"; "scan" or "attention" leaves the other layer out of every block.

    Raises ValueError for values that do not fit, naming the field.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LaMambaBlock"]
    _repeated_blocks = ["LaMambaBlock"]
    _keep_in_fp32_modules = ["A_log", "dt_bias", "D"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_classes: int = 1000,
        base_channels: int = 320,
        depths: list[int] | tuple[int, ...] = (2, 2, 2, 2),
        bottleneck_depth: int = 2,
        num_heads: int = 16,
        window_size: int = 8,
        ssm_state_size: int = 16,
        ssm_ratio: float = 2.0,
        ssm_conv: int = 3,
        mlp_ratio: float = 4.0,
        continuous_scan: bool = True,
        class_dropout_prob: float = 0.1,
        scan_backend: str = "auto",
        mixers: str = "both",
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        _check_config(dict(self.config), out_channels)
        self.out_channels = out_channels
        widths = [base_channels * width for width in WIDTHS]
        cond = widths[-1]
        self.gradient_checkpointing = False
        self.patch_proj = nn.Conv2d(in_channels, widths[0], 1)
        self.patch_norm = nn.LayerNorm(widths[0])
        self.pos_embed = nn.Parameter(sincos_table(sample_size, widths[0])[None])
        self.time_fc1 = nn.Linear(TIME_CHANNELS, cond)
        self.time_fc2 = nn.Linear(cond, cond)
        self.label_embed = nn.Embedding(num_classes + 1, cond)

        options: dict[str, Any] = {
            "heads": num_heads, "state_size": ssm_state_size, "ssm_ratio": ssm_ratio, "conv": ssm_conv,
            "mlp_ratio": mlp_ratio, "continuous": continuous_scan, "backend": scan_backend, "mixers": mixers,
        }  # fmt: skip

        def stage(number: int, depth: int, project: bool = False) -> nn.ModuleList:
            side = sample_size >> HALVINGS[number]
            window = min(window_size, side)
            shift = 0 if side <= window_size else window // 2
            return nn.ModuleList(
                LaMambaBlock(
                    widths[number], cond, window=window, shift=shift * (i % 2), project=project, **options
                )
                for i in range(depth)
            )  # fmt: skip

        self.encoder = nn.ModuleList(stage(i, depth) for i, depth in enumerate(depths))
        self.down = nn.ModuleList(PatchMerging(width) for width in widths[:2])
        self.mid = stage(3, bottleneck_depth)
        last = depths[3] + 1 if depths[3] else 0
        deeper = [depths[0] + 1, depths[1] + 1, depths[2] + 1, last]
        self.decoder = nn.ModuleList(stage(i, deeper[i], project=True) for i in reversed(range(4)))
        self.up = nn.ModuleList(PatchExpanding(width) for width in (widths[2], widths[1]))
        self.head = Head(widths[0], cond, out_channels)
        self._initialise()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicted noise (and variance) of noisy latents.

        Args:
            hidden_states: `[B, in_channels, N, N]`. N may differ from sample_size (a multiple of 8 whose stages the
                windows tile): the position table is interpolated.
            timestep: `[B]` or one for all.
            class_labels: int `[B]`, num_classes for the null class; may be left out of an unconditional model.
            cross_attention_kwargs: must be empty; the blocks have no cross-attention.

        Returns `Transformer2DModelOutput` with sample `[B, out_channels, N, N]`, or a tuple of it. In training mode
        `class_dropout_prob` of the labels become the null class. Raises ValueError for inputs that do not fit.
        """
        if cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs must be empty, got {sorted(cross_attention_kwargs)}")
        if timestep is None:
            raise ValueError("timestep must be given: one for all rows, or [B]")
        self._check_inputs(hidden_states)
        cond = self._condition(hidden_states, timestep, class_labels)
        x = self.patch_norm(self.patch_proj(hidden_states).permute(0, 2, 3, 1)) + self._positions(hidden_states)
        skips = []
        for number, blocks in enumerate(self.encoder):
            x = self._run(blocks, x, cond)
            skips.append(x)
            if number < len(self.down):
                x = self.down[number](x)
        x = x + self._run(self.mid, x, cond)
        for number, blocks in enumerate(self.decoder):
            if number >= 2:
                x = self.up[number - 2](x)
            x = self._run(blocks, x + skips.pop(), cond)
        sample = self.head(x, cond).permute(0, 3, 1, 2).contiguous()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, blocks: nn.ModuleList, x: Tensor, cond: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, cond)
            else:
                x = block(x, cond)
        return x

    def _condition(self, hidden_states: Tensor, timestep: Tensor | int | float, labels: Tensor | None) -> Tensor:
        batch, device, null = hidden_states.shape[0], hidden_states.device, self.config.num_classes
        times = torch.as_tensor(timestep, device=device).reshape(-1).expand(batch)
        waves = get_timestep_embedding(times, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        cond = self.time_fc2(silu(self.time_fc1(waves.to(hidden_states.dtype))))
        if null == 0:
            labels = torch.zeros(batch, dtype=torch.long, device=device)
        else:
            labels = _check_labels(labels, batch, null).to(device)
            if self.training and self.config.class_dropout_prob > 0:
                labels = labels.masked_fill(torch.rand(batch, device=device) < self.config.class_dropout_prob, null)
        return cond + self.label_embed(labels)

    def _positions(self, hidden_states: Tensor) -> Tensor:
        side = hidden_states.shape[-1]
        if side == self.config.sample_size:
            return self.pos_embed
        return resized_positions(self.pos_embed, side)

    def _check_inputs(self, hidden_states: Tensor) -> None:
        if hidden_states.dim() != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"hidden_states must be [B, {self.config.in_channels}, N, N] (in_channels={self.config.in_channels}), "
                f"got {tuple(hidden_states.shape)}"
            )
        height, width = hidden_states.shape[2:]
        if height != width or height % 8 or height == 0:
            raise ValueError(
                f"hidden_states must be square with a side that is a multiple of 8 (the scan paths need even sides in "
                f"every stage), got {height} x {width}"
            )

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.rel_bias, std=0.02)
        # A 1x1 convolution is a matrix; blocks and head start as the identity of their condition.
        nn.init.xavier_uniform_(self.patch_proj.weight.flatten(1))
        nn.init.zeros_(self.patch_proj.bias)
        for module in self.modules():
            if isinstance(module, LaMambaBlock | Head):
                nn.init.zeros_(module.modulation.weight)
            elif isinstance(module, SelectiveScan2D):
                module.reset_scan()
        for weight in (self.time_fc1.weight, self.time_fc2.weight, self.label_embed.weight):
            nn.init.normal_(weight, std=0.02)


class PatchMerging(nn.Module):
    """Half the side, twice the channels: the four positions of a 2x2 patch side by side, LayerNorm, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, N, C]` -> `[B, N/2, N/2, 2C]`; patch positions in the order (0,0), (1,0), (0,1), (1,1)."""
        batch, side, _, dim = x.shape
        x = x.view(batch, side // 2, 2, side // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class PatchExpanding(nn.Module):
    """Twice the side, half the channels: Linear, its output cut into a 2x2 patch, LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, N, C]` -> `[B, 2N, 2N, C/2]`"""
        batch, side, _, dim = x.shape
        x = self.expand(x).view(batch, side, side, 2, 2, dim // 2).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(batch, 2 * side, 2 * side, dim // 2))


class Head(nn.Module):
    """The prediction from the features of the last stage, modulated by the condition."""

    def __init__(self, dim: int, cond_dim: int, out_channels: int) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(cond_dim, dim)
        self.expand = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, out_channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x `[B, N, N, d]`, cond `[B, Dc]` -> `[B, N, N, out_channels]`"""
        shift, scale = self.modulation(silu(self.cond_proj(cond)))[:, None, None].chunk(2, -1)
        x = layer_norm(self.norm(self.expand(x)), x.shape[-1:], eps=FINAL_EPS)
        return self.proj(x * (1 + scale) + shift)


def sincos_table(side: int, dim: int) -> Tensor:
    """2-D sine-cosine table `[side, side, dim]`: half of the channels from the column, then half from the row.

    Each half is sin(p w_i) for all i, then cos(p w_i), w_i = 10000^(-i / (dim / 4)), i = 0..dim/4-1.
    """
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1).to(torch.get_default_dtype())
    return torch.cat([waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], 2)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """A position table `[1, N, N, d]` for another side, bicubic, `[1, side, side, d]`."""
    resized = interpolate(table.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(table.dtype)


def _check_labels(labels: Tensor | None, batch: int, null: int) -> Tensor:
    if labels is None:
        raise ValueError(f"class_labels must be given, int [B]; {null} is the null class")
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ValueError(f"class_labels must be int [{batch}], got {labels.dtype} {tuple(labels.shape)}")
    # Reading values waits for the device, and an index out of range raises there anyway.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > null:
            raise ValueError(f"class_labels must be from 0 to {null} (the null class), got {low} to {high}")
    return labels.long()


def _check_config(config: dict[str, Any], out_channels: int) -> None:
    for name, least in (
        ("sample_size", 8), ("in_channels", 1), ("num_classes", 0), ("base_channels", 4), ("bottleneck_depth", 0),
        ("num_heads", 1), ("window_size", 1), ("ssm_state_size", 1), ("ssm_conv", 1),
    ):  # fmt: skip
        require_int(name, config[name], least)
    side, width, depths = config["sample_size"], config["base_channels"], config["depths"]
    if side % 8:
        raise ValueError(f"sample_size must be a multiple of 8 (even sides in every stage), got {side}")
    for stage, halvings in enumerate(HALVINGS):
        if side >> halvings > config["window_size"] and (side >> halvings) % config["window_size"]:
            raise ValueError(
                f"window_size={config['window_size']} does not tile stage {stage}, whose side is {side >> halvings} "
                f"at sample_size={side}; use a divisor of it, or a window at least as large"
            )
    if width % 4:
        raise ValueError(f"base_channels must be a multiple of 4 (sine-cosine positions), got {width}")
    if width % config["num_heads"]:
        raise ValueError(f"base_channels={width} must be a multiple of num_heads={config['num_heads']}")
    if out_channels not in (config["in_channels"], 2 * config["in_channels"]):
        raise ValueError(
            f"out_channels must be in_channels={config['in_channels']} (noise) or twice as many (noise and variance), "
            f"got {out_channels}"
        )
    if len(depths) != 4 or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in depths):
        raise ValueError(f"depths must be four integers >= 0, got {list(depths)}")
    if config["ssm_conv"] % 2 == 0:
        raise ValueError(f"ssm_conv must be odd, got {config['ssm_conv']}")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(f"class_dropout_prob must be from 0 to 1, got {config['class_dropout_prob']}")
    for name, allowed in (("scan_backend", BACKENDS), ("mixers", tuple(MIXERS))):
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {config[name]!r}")


# DiffusionPipeline writes a class's module into model_index.json and looks it up there when it loads.
LaMambaDiffTransformer2DModel.__module__ = "hf_attn"
