"""BiFormer for transformers. Parameters have the names of the official checkpoints behind the prefix `biformer.`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.models.biformer.configuration_biformer import FULL, FULL_LEPE, BiFormerConfig
from hf_attn.models.biformer.layers import (
    BilevelRoutingAttention,
    BilevelRoutingAttentionNchw,
    FullAttention,
    convolution_mixer,
    depthwise,
)
from hf_attn.models.vision.layers import ChannelLayerNorm, DropPath, drop_path_rates
from hf_attn.models.vision.modeling_vision import (
    VisionBackbone,
    VisionForImageClassification,
    VisionModel,
    VisionPreTrainedModel,
)
from hf_attn.models.vision.official import OfficialNames


def _mixer(config: BiFormerConfig, stage: int) -> nn.Module:
    top_k = config.topks[stage]
    if top_k in (FULL, FULL_LEPE):
        return FullAttention(config, stage, lepe=top_k == FULL_LEPE)
    if top_k == 0:
        return convolution_mixer(config.embed_dims[stage])
    routed = BilevelRoutingAttention if config.attention_layout == "legacy" else BilevelRoutingAttentionNchw
    return routed(config, stage)


class BiFormerBlock(GradientCheckpointingLayer):
    """Positional convolution, token mixer and MLP, each with a residual; `[B, C, H, W]` in and out."""

    def __init__(self, config: BiFormerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width, eps = config.embed_dims[stage], config.layer_norm_eps
        hidden = int(config.mlp_ratios[stage] * width)
        if config.before_attn_dwconv:
            self.pos_embed = depthwise(width, config.before_attn_dwconv)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _mixer(config, stage)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        # The second place is the official DWConv switch, which no release uses.
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = DropPath(drop_path)
        if config.layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(torch.empty(width))
            self.gamma2 = nn.Parameter(torch.empty(width))

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        if hasattr(self, "pos_embed"):
            maps = maps + self.pos_embed(maps)
        maps = maps.permute(0, 2, 3, 1)
        mixed, scaled = self.attn(self.norm1(maps)), hasattr(self, "gamma1")
        maps = maps + self.drop_path(self.gamma1 * mixed if scaled else mixed)
        mixed = self.mlp(self.norm2(maps))
        maps = maps + self.drop_path(self.gamma2 * mixed if scaled else mixed)
        return maps.permute(0, 3, 1, 2)


def _downsampling(config: BiFormerConfig, stage: int) -> nn.Sequential:
    """What leads to a stage: the stem before the first, patch merging before the others."""
    width = config.embed_dims[stage]
    if stage == 0 and config.stem == "patch":
        return nn.Sequential(nn.Conv2d(config.num_channels, width, 4, 4), nn.BatchNorm2d(width))
    if stage == 0:
        half = width // 2
        return nn.Sequential(
            nn.Conv2d(config.num_channels, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, width, 3, 2, 1),
            nn.BatchNorm2d(width),
        )
    before = config.embed_dims[stage - 1]
    if config.stem == "patch":
        return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, width, 2, 2))
    return nn.Sequential(nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width))


class BiFormerPreTrainedModel(VisionPreTrainedModel):
    """What the classes of BiFormer share."""

    config_class = BiFormerConfig
    base_model_prefix = "biformer"
    _no_split_modules = ["BiFormerBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True
    official_names = OfficialNames(
        prefixes={
            "": "biformer.",
            "head.": "classifier.",
            **{f"extra_norms.{stage}.": f"hidden_states_norms.stage{stage + 1}." for stage in range(4)},
        },
        unused=("head.", "norm.", "extra_norms."),
        optional=("hidden_states_norms.",),
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BiFormerBlock) and hasattr(module, "gamma1"):
            for gamma in (module.gamma1, module.gamma2):
                init.constant_(gamma, self.config.layer_scale_init_value)


class BiFormerModel(BiFormerPreTrainedModel, VisionModel):
    """BiFormer without a head."""

    def __init__(self, config: BiFormerConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.validate_architecture()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.downsample_layers = nn.ModuleList([_downsampling(config, stage) for stage in range(len(config.depths))])
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([BiFormerBlock(config, stage, rate) for rate in rates[stage]])
                for stage in range(len(rates))
            ]
        )
        self.add_pooling_layer = add_pooling_layer
        if add_pooling_layer:
            self.norm = nn.BatchNorm2d(config.embed_dims[-1])
        self.gradient_checkpointing = False
        self.post_init()

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps of `config.stage_names`, `[B, C, H, W]` each, of images `[B, 3, H, W]`."""
        maps = []
        # The layout of the blocks, from the start: depthwise convolutions take half the time in it.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        for stage, (downsampling, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            pixel_values = downsampling(pixel_values)
            if stage == 0:
                maps.append(pixel_values)
            for block in blocks:
                pixel_values = block(pixel_values)
            maps.append(pixel_values)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """The last map `[B, C, H, W]` -> `[B, C]`, what the classifier takes."""
        return self.norm(last).mean((2, 3))


BiFormerPreTrainedModel.model_class = BiFormerModel


class BiFormerForImageClassification(BiFormerPreTrainedModel, VisionForImageClassification):
    """BiFormer with a linear classifier on the pooled, normed last map."""


class BiFormerBackbone(VisionBackbone, BiFormerPreTrainedModel):
    """BiFormer for dense tasks: maps of stages, each through a LayerNorm of its channels."""

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of a feature map with `channels` channels."""
        return ChannelLayerNorm(channels)
