"""OverLoCK for transformers. Parameters have the names of the official checkpoints behind the prefix `overlock.`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from hf_attn.models.overlock.configuration_overlock import OverlockConfig
from hf_attn.models.overlock.contmix import OverlockDynamicBlock, OverlockMixer
from hf_attn.models.overlock.layers import OverlockGrn, OverlockLayerScale, OverlockRepConvBlock, conv_norm, stem
from hf_attn.models.vision.layers import ChannelLayerNorm, drop_path_rates
from hf_attn.models.vision.modeling_vision import VisionBackbone, VisionModel, VisionPreTrainedModel
from hf_attn.models.vision.official import OfficialNames


@dataclass
class OverlockModelOutput(BaseModelOutputWithPoolingAndNoAttention):
    """Output of the trunk.

    Args:
        base_map: stage 3 of Base-Net, `[B, C3, H / 16, W / 16]`.
        overview_map: output of Overview-Net, `[B, C4, H / 32, W / 32]`.
    """

    base_map: Tensor | None = None
    overview_map: Tensor | None = None


@dataclass
class OverlockClassifierOutput(ImageClassifierOutputWithNoAttention):
    """Output of the classifier.

    Args:
        aux_logits: `[B, num_labels]` of the second head; in training, or when asked for.
    """

    aux_logits: Tensor | None = None


class OverlockPreTrainedModel(VisionPreTrainedModel):
    """What the classes of OverLoCK share."""

    config_class = OverlockConfig
    base_model_prefix = "overlock"
    conv_init = "normal"
    _no_split_modules = ["OverlockRepConvBlock", "OverlockDynamicBlock"]
    official_names = OfficialNames(
        prefixes={
            "": "overlock.",
            "head.": "head.",
            "aux_head.": "aux_head.",
            **{f"extra_norm.{stage}.": f"hidden_states_norms.stage{stage + 1}." for stage in range(4)},
        },
        unused=("head.", "aux_head.", "extra_norm."),
        optional=("hidden_states_norms.",),
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OverlockLayerScale):
            init.constant_(module.weight, module.value)
            init.zeros_(module.bias)
        elif isinstance(module, OverlockGrn):
            init.zeros_(module.gamma)
            init.zeros_(module.beta)
        elif isinstance(module, OverlockMixer):
            init.zeros_(module.rpb1)
            init.zeros_(module.rpb2)


def _static_stage(config: OverlockConfig, stage: int, rates: list[float]) -> nn.ModuleList:
    return nn.ModuleList(
        [
            OverlockRepConvBlock(
                config.embed_dims[stage],
                kernel=config.kernel_sizes[stage],
                mlp_ratio=config.mlp_ratios[stage],
                ls_init_value=config.ls_init_values[stage],
                res_scale=config.res_scale,
                drop_path=rate,
                deploy=config.deploy,
            )
            for rate in rates
        ]
    )


def _focus_stage(config: OverlockConfig, part: int, rates: list[float]) -> nn.ModuleList:
    stage = 2 + part
    return nn.ModuleList(
        [
            OverlockDynamicBlock(
                config.embed_dims[stage],
                config.context_dim,
                kernel=config.kernel_sizes[stage],
                small_kernel=config.smk_size,
                num_heads=config.sub_num_heads[part],
                mlp_ratio=config.sub_mlp_ratios[part],
                ls_init_value=config.ls_init_values[stage],
                res_scale=config.res_scale,
                drop_path=rate,
                deploy=config.deploy,
                is_first=part == 0 and index == 0,
                is_last=part == 1 and index == len(rates) - 1,
                backend=config.na_backend,
            )
            for index, rate in enumerate(rates)
        ]
    )


class OverlockModel(OverlockPreTrainedModel, VisionModel):
    """OverLoCK without a head; its pooled features are the mean of the last map."""

    def __init__(self, config: OverlockConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.validate_architecture()
        dims, context = config.embed_dims, config.context_dim
        rates = drop_path_rates(config.drop_path_rate, [*config.depths, *config.sub_depths])
        self.patch_embed1 = stem(config.num_channels, dims[0])
        for stage in (1, 2, 3):
            self.add_module(f"patch_embed{stage + 1}", conv_norm(dims[stage - 1], dims[stage], 3, 2))
        for stage in range(4):
            self.add_module(f"blocks{stage + 1}", _static_stage(config, stage, rates[stage]))
        self.high_level_proj = nn.Conv2d(dims[3], context, 1)
        self.patch_embedx = nn.ModuleDict(
            {"x_proj": conv_norm(dims[2], dims[3], 3, 2), "h_proj": conv_norm(context, context, 3, 2)}
        )
        self.sub_blocks3 = _focus_stage(config, 0, rates[4])
        self.sub_blocks4 = _focus_stage(config, 1, rates[5])
        self.add_pooling_layer = add_pooling_layer
        self.gradient_checkpointing = False
        self.post_init()

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps of `config.stage_names`, `[B, C, H, W]` each, of images `[B, 3, H, W]`."""
        return self.all_maps(pixel_values)[0]

    def all_maps(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The maps of `config.stage_names`, stage 3 of Base-Net, and the output of Overview-Net.

        pixel_values: `[B, 3, H, W]`; every map is `[B, C, H, W]`.
        """
        if self.training and self.config.deploy:
            warnings.warn(
                "this OverLoCK is reparameterised and in training mode: its large kernels have lost their branches, "
                "and fine-tuning it loses accuracy; train the original form and reparameterize afterwards",
                stacklevel=2,
            )
        maps = [self.patch_embed1(pixel_values)]
        maps.append(_run(self.blocks1, maps[-1]))
        maps.append(_run(self.blocks2, self.patch_embed2(maps[-1])))
        base = _run(self.blocks3, self.patch_embed3(maps[-1]))
        overview = _run(self.blocks4, self.patch_embed4(base))
        return [*maps, *self._focus(base, overview)], base, overview

    def _focus(self, hidden: Tensor, overview: Tensor) -> tuple[Tensor, Tensor]:
        coarse = self.high_level_proj(overview)
        original = interpolate(coarse, hidden.shape[2:], mode="bilinear", align_corners=False)
        context = original
        for block in self.sub_blocks3:
            hidden, context = block(hidden, context, original)
        third = torch.cat([hidden, context], 1)
        hidden, context = self.patch_embedx["x_proj"](hidden), self.patch_embedx["h_proj"](context)
        for block in self.sub_blocks4[:-1]:
            hidden, context = block(hidden, context, coarse)
        return third, self.sub_blocks4[-1](hidden, context, coarse)

    def pool(self, last: Tensor) -> Tensor:
        """The last map `[B, C, H, W]` -> `[B, C]`, what the classifier takes."""
        return last.mean((2, 3))

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool | None = None, **unused: Any
    ) -> OverlockModelOutput | tuple:
        """Last map and pooled features of images `[B, C, H, W]`; with `output_hidden_states` all maps."""
        maps, base, overview = self.all_maps(self.check_pixels(pixel_values))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return OverlockModelOutput(
            last_hidden_state=maps[-1],
            pooler_output=self.pool(maps[-1]) if self.add_pooling_layer else None,
            hidden_states=tuple(maps) if wanted else None,
            base_map=base,
            overview_map=overview,
        )


def _run(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden


OverlockPreTrainedModel.model_class = OverlockModel


class OverlockForImageClassification(OverlockPreTrainedModel):
    """OverLoCK with the published classifier and, for training, a second one on the overview."""

    def __init__(self, config: OverlockConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.overlock = OverlockModel(config)
        width = config.projection_dim
        self.head = nn.Sequential(
            *conv_norm(config.stage_channels[-1], width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, config.num_labels, 1) if config.num_labels else nn.Identity(),
        )
        if config.use_aux_head:
            last = config.embed_dims[3]
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(last), nn.AdaptiveAvgPool2d(1), nn.Conv2d(last, config.num_labels, 1)
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_aux_logits: bool | None = None,
        **unused: Any,
    ) -> OverlockClassifierOutput | tuple:
        """Logits `[B, num_labels]` of images `[B, C, H, W]`, and the loss when `labels` are given.

        Args:
            labels: int `[B]` classes; float `[B, num_labels]` for several labels an image; see `config.problem_type`.
                In training the loss is that of the logits plus `config.aux_loss_weight` times that of `aux_logits`.
            output_hidden_states: also return the maps of stem and stages.
            output_aux_logits: run the second head; default in training only.
        """
        outputs = self.overlock(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits, loss, aux = self.head(outputs.last_hidden_state).flatten(1), None, None
        if hasattr(self, "aux_head") and (self.training if output_aux_logits is None else output_aux_logits):
            aux = self.aux_head(outputs.overview_map).flatten(1)
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if self.training and aux is not None:
                aux_loss = self.loss_function(labels=labels, pooled_logits=aux, config=self.config)
                loss = loss + self.config.aux_loss_weight * aux_loss
        return OverlockClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, aux_logits=aux)


class OverlockBackbone(VisionBackbone, OverlockPreTrainedModel):
    """OverLoCK for dense tasks: maps of stages, each through a LayerNorm of its channels."""

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of a feature map with `channels` channels."""
        return ChannelLayerNorm(channels)
