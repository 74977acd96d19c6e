"""EMOv2 for transformers. Parameters have the names of the official checkpoints behind the prefix `emov2.`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_attn.models.emov2.configuration_emov2 import EMOv2Config
from hf_attn.models.emov2.layers import EMOv2Block, EMOv2ConvLayer, EMOv2LayerNorm, EMOv2LayerScale
from hf_attn.models.vision.layers import drop_path_rates
from hf_attn.models.vision.modeling_vision import (
    VisionBackbone,
    VisionForImageClassification,
    VisionModel,
    VisionPreTrainedModel,
)
from hf_attn.models.vision.official import OfficialNames


class EMOv2PreTrainedModel(VisionPreTrainedModel):
    """What the classes of EMOv2 share."""

    config_class = EMOv2Config
    base_model_prefix = "emov2"
    _no_split_modules = ["EMOv2Block"]
    _supports_sdpa = True
    _supports_attention_backend = True
    official_names = OfficialNames(prefixes={"": "emov2.", "head.": "classifier."}, unused=("head.", "norm."))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EMOv2LayerScale):
            init.constant_(module.gamma, module.value)


def _stem(config: EMOv2Config) -> nn.Sequential:
    half = config.embed_dims[0] // 2
    return nn.Sequential(
        EMOv2ConvLayer(config.num_channels, half, 3, 2, bias=True, norm=True, act="silu"),
        EMOv2ConvLayer(half, half, 3, depthwise=True, norm=True, act="silu"),
        EMOv2ConvLayer(half, half),
    )


def _stage(config: EMOv2Config, stage: int, rates: list[float]) -> nn.ModuleList:
    ratio, dim = config.expand_ratios[stage], config.embed_dims[stage]
    shared: dict[str, Any] = {
        "norm": config.norm_types[stage],
        "act": config.act[stage],
        "kernel": config.kernel_sizes[stage],
        "head_dim": config.head_dims[stage],
        "window": config.window_sizes[stage],
        "qkv_bias": config.qkv_bias,
        "layer_scale": config.layer_scale_init_value,
        "config": config,
    }
    first = EMOv2Block(
        config.stage_channels[stage],
        dim,
        expand_ratio=2 * ratio,
        stride=2,
        has_skip=False,
        drop_path=rates[0],
        **shared,
    )
    rest = [
        EMOv2Block(dim, dim, expand_ratio=ratio, expansion=config.expand_ops[stage], drop_path=rate, **shared)
        for rate in rates[1:]
    ]
    return nn.ModuleList([first, *rest])


class EMOv2Model(EMOv2PreTrainedModel, VisionModel):
    """EMOv2 without a head."""

    def __init__(self, config: EMOv2Config, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.validate_architecture()
        self.stage0 = _stem(config)
        for stage, rates in enumerate(drop_path_rates(config.drop_path_rate, config.depths)):
            self.add_module(f"stage{stage + 1}", _stage(config, stage, rates))
        self.add_pooling_layer = add_pooling_layer
        if add_pooling_layer:
            self.norm = EMOv2LayerNorm(config.embed_dims[-1])
        self.gradient_checkpointing = False
        self.post_init()

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps of `config.stage_names`, `[B, C, H, W]` each, of images `[B, 3, H, W]`."""
        maps = [self.stage0(pixel_values)]
        for stage in range(1, len(self.config.depths) + 1):
            hidden = maps[-1]
            for block in getattr(self, f"stage{stage}"):
                hidden = block(hidden)
            maps.append(hidden)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """The last map `[B, C, H, W]` -> `[B, C]`, what the classifier takes."""
        return self.norm(last).mean((2, 3))


EMOv2PreTrainedModel.model_class = EMOv2Model


class EMOv2ForImageClassification(EMOv2PreTrainedModel, VisionForImageClassification):
    """EMOv2 with a linear classifier on the pooled, normed last map."""


class EMOv2Backbone(VisionBackbone, EMOv2PreTrainedModel):
    """EMOv2 for dense tasks: the maps of stages as they are, as the published detectors and segmenters read them."""

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of a feature map with `channels` channels."""
        return nn.Identity()
