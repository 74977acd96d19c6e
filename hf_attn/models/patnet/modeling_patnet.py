"""PATNet for transformers. Parameters have the names of the official checkpoints behind the prefix `patnet.`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.models.patnet.configuration_patnet import PatNetConfig
from hf_attn.models.patnet.layers import PartialAttention, RelativeBias, SpatialGate, folded
from hf_attn.models.vision.layers import DropPath, drop_path_rates
from hf_attn.models.vision.modeling_vision import (
    VisionBackbone,
    VisionForImageClassification,
    VisionModel,
    VisionPreTrainedModel,
)
from hf_attn.models.vision.official import OfficialNames


class PatNetBlock(GradientCheckpointingLayer):
    """Partial attention and an MLP of 1x1 convolutions."""

    def __init__(self, config: PatNetConfig, width: int, drop_path: float, *, kind: str) -> None:
        super().__init__()
        hidden, deploy, spatial = int(width * config.mlp_ratio), config.deploy, config.use_spatial_attn
        self.spatial_mixing = PartialAttention(config, width, kind)
        mlp = [
            nn.Conv2d(width, hidden, 1, bias=deploy),
            nn.Identity() if deploy else nn.BatchNorm2d(hidden),
            ACT2FN[config.hidden_act],
            nn.Conv2d(hidden, width + (deploy and spatial), 1, bias=deploy and spatial),
        ]
        self.mlp = nn.Sequential(*mlp, *([SpatialGate(width, deploy)] if spatial else []))
        self.drop_path = DropPath(drop_path)
        if config.layer_scale_init_value > 0:
            self.layer_scale = nn.Parameter(torch.empty(width))

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        mixed = self.spatial_mixing(maps)
        if self.spatial_mixing.kind == "self":
            # Self-attention has a residual of its own, without stochastic depth.
            maps = mixed = maps + mixed
        branch = self.mlp(mixed)
        if hasattr(self, "layer_scale"):
            branch = branch * self.layer_scale[:, None, None]
        return maps + self.drop_path(branch)

    def reparameterize(self) -> None:
        """Fold all batch norms, and the convolutions of the spatial gate, into the two convolutions of the MLP."""
        shift = self.spatial_mixing.take_norm() if self.spatial_mixing.kind == "channel" else None
        self.mlp[0], self.mlp[1] = folded(self.mlp[0], self.mlp[1], shift), nn.Identity()
        if len(self.mlp) > 4:
            self.mlp[3] = self.mlp[4].fold_into(self.mlp[3])


class PatNetStage(nn.Module):
    """The blocks of one stage."""

    def __init__(self, config: PatNetConfig, stage: int, rates: list[float]) -> None:
        super().__init__()
        width = config.stage_channels[stage + 1]
        kind = "self" if stage == len(config.depths) - 1 else "channel"
        kind = kind if config.use_channel_attn else "none"
        self.blocks = nn.ModuleList([PatNetBlock(config, width, rate, kind=kind) for rate in rates])

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        for block in self.blocks:
            maps = block(maps)
        return maps


class PatchEmbedding(nn.Module):
    """4x4 patches."""

    def __init__(self, channels: int, width: int, deploy: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 4, 4, bias=deploy)
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> `[B, C, H / 4, W / 4]`."""
        return self.norm(self.proj(pixel_values))

    def reparameterize(self) -> None:
        """Fold the norm into the convolution."""
        self.proj, self.norm = folded(self.proj, self.norm), nn.Identity()


class PatchMerging(nn.Module):
    """2x2 positions become one of twice the width."""

    def __init__(self, width: int, deploy: bool = False) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(width, 2 * width, 2, 2, bias=deploy)
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, channels_out, H / 2, W / 2]`."""
        return self.norm(self.reduction(maps))

    def reparameterize(self) -> None:
        """Fold the norm into the convolution."""
        self.reduction, self.norm = folded(self.reduction, self.norm), nn.Identity()


class PatNetPreTrainedModel(VisionPreTrainedModel):
    """What the classes of PATNet share."""

    config_class = PatNetConfig
    base_model_prefix = "patnet"
    _no_split_modules = ["PatNetBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True
    conv_init = "normal"
    official_names = OfficialNames(
        prefixes={
            "": "patnet.",
            "head.": "classifier.",
            **{f"norm{2 * stage}.": f"hidden_states_norms.stage{stage + 1}." for stage in range(4)},
        },
        unused=("head.", "avgpool_pre_head.", *(f"norm{2 * stage}." for stage in range(4))),
        optional=("hidden_states_norms.",),
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RelativeBias):
            init.zeros_(module.lookup_table_bias)
        elif isinstance(module, PatNetBlock) and hasattr(module, "layer_scale"):
            init.constant_(module.layer_scale, self.config.layer_scale_init_value)


class PatNetModel(PatNetPreTrainedModel, VisionModel):
    """PATNet without a head."""

    def __init__(self, config: PatNetConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.validate_architecture()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.patch_embed = PatchEmbedding(config.num_channels, config.embed_dim, config.deploy)
        stages: list[nn.Module] = []
        for stage in range(len(config.depths)):
            if stage:
                stages.append(PatchMerging(config.stage_channels[stage], config.deploy))
            stages.append(PatNetStage(config, stage, rates[stage]))
        self.stages = nn.ModuleList(stages)
        self.add_pooling_layer = add_pooling_layer
        if add_pooling_layer:
            self.avgpool_pre_head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(config.stage_channels[-1], config.feature_dim, 1, bias=False),
                ACT2FN[config.hidden_act],
            )
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def num_features(self) -> int:
        return self.config.feature_dim

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps of `config.stage_names`, `[B, C, H, W]` each, of images `[B, 3, H, W]`."""
        maps = [self.patch_embed(pixel_values)]
        found = maps[0]
        for layer in self.stages:
            found = layer(found)
            if isinstance(layer, PatNetStage):
                maps.append(found)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """The last map `[B, C, H, W]` -> `[B, C]`, what the classifier takes."""
        return self.avgpool_pre_head(last).flatten(1)


PatNetPreTrainedModel.model_class = PatNetModel


class PatNetForImageClassification(PatNetPreTrainedModel, VisionForImageClassification):
    """PATNet with a linear classifier on the pooled, projected last map."""


class PatNetBackbone(VisionBackbone, PatNetPreTrainedModel):
    """PATNet for dense tasks: maps of stages, each through a batch norm."""

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of a feature map with `channels` channels."""
        return nn.BatchNorm2d(channels)
