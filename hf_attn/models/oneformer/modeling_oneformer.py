"""OneFormer classes with transformers' config and weights, built with neither natten nor scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoBackbone, OneFormerConfig
from transformers.models.oneformer import modeling_oneformer as host

from hf_attn.integrations.transformers.repairs.oneformer import loss, mend, model
from hf_attn.models.dinat.modeling_dinat import DinatAttnBackbone


class OneFormerAttnModel(model.MendedOneFormerModel):
    """OneFormer without its losses: `OneFormerModel` with the faults of docs/oneformer.md mended.

    Args:
        config: OneFormerConfig with, beside its own fields: `text_attention` ("causal", the official default, or
            "bidirectional", as transformers) and `deformable_attn_implementation` ("auto", "grid_sample", "torch",
            "triton"). Any AutoBackbone config with four feature maps may be its backbone, `dinat` and `nat` included.

    Raises ValueError for other values, and for backbones that give another number of feature maps.
    """

    def __init__(self, config: OneFormerConfig) -> None:
        host.OneFormerPreTrainedModel.__init__(self, config)
        build_model(self, config)
        self.post_init()


class OneFormerAttnForUniversalSegmentation(model.MendedSegmentation):
    """Semantic, instance and panoptic segmentation with one model; config as in `OneFormerAttnModel`."""

    def __init__(self, config: OneFormerConfig) -> None:
        host.OneFormerPreTrainedModel.__init__(self, config)
        build_segmentation(self, config, OneFormerAttnModel)
        self.post_init()


def build_model(self: host.OneFormerModel, config: OneFormerConfig) -> None:
    """The modules of a OneFormerModel, under the host's names."""
    model.check_options(config)
    encoder = build_backbone(config)
    pixels = host.OneFormerPixelLevelModule.__new__(host.OneFormerPixelLevelModule)
    nn.Module.__init__(pixels)  # the host's constructor would build the backbone again
    pixels.encoder = encoder
    pixels.decoder = host.OneFormerPixelDecoder(config, feature_channels=encoder.channels)
    self.pixel_level_module = pixels
    self.transformer_module = host.OneFormerTransformerModule(in_features=config.conv_dim, config=config)
    self.task_encoder = host.OneFormerTaskModel(config)
    self.is_training = config.is_training
    self.text_mapper = host.OneFormerTextMapper(config) if config.is_training else None
    mend(self, config)


def build_segmentation(
    self: host.OneFormerForUniversalSegmentation, config: OneFormerConfig, inner: type[host.OneFormerModel]
) -> None:
    """The modules and losses of a OneFormerForUniversalSegmentation, under the host's names."""
    self.model = inner(config)
    self.matcher = loss.MendedMatcher(
        cost_class=config.class_weight,
        cost_dice=config.dice_weight,
        cost_mask=config.mask_weight,
        num_points=config.train_num_points,
    )
    self.weight_dict = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
        "loss_contrastive": config.contrastive_weight,
    }
    self.criterion = loss.MendedLoss(
        num_classes=config.num_labels,
        matcher=self.matcher,
        weight_dict=self.weight_dict,
        eos_coef=config.no_object_weight,
        num_points=config.train_num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
        contrastive_temperature=config.contrastive_temperature,
    )


def build_backbone(config: OneFormerConfig) -> nn.Module:
    """The backbone that `config.backbone_config` names; attention as the model's where it supports that.

    Raises ValueError for a backbone without an AutoBackbone class, or with other feature maps than `strides`.
    """
    inner = config.backbone_config
    if inner.model_type in ("dinat", "nat"):
        kind, build = DinatAttnBackbone, DinatAttnBackbone
    elif type(inner) in AutoBackbone._model_mapping:
        kind, build = AutoBackbone._model_mapping[type(inner)], AutoBackbone.from_config
    else:
        raise ValueError(
            f"backbone_config is of type {inner.model_type!r}, which has no AutoBackbone class; take e.g. 'swin', "
            "'dinat', 'convnext', or register your class with AutoBackbone"
        )
    inner._attn_implementation = model.backbone_implementation(kind, config._attn_implementation)
    backbone = build(inner)
    if len(backbone.channels) != len(config.strides):
        raise ValueError(
            f"the backbone gives {len(backbone.channels)} feature maps ({backbone.out_features}), but config.strides "
            f"names {len(config.strides)}; pass out_features with one stage for each stride to the backbone_config"
        )
    return backbone


def _model_init(self: host.OneFormerModel, config: OneFormerConfig) -> None:
    host.OneFormerPreTrainedModel.__init__(self, config)
    build_model(self, config)
    self.post_init()


def _segmentation_init(self: host.OneFormerForUniversalSegmentation, config: OneFormerConfig) -> None:
    host.OneFormerPreTrainedModel.__init__(self, config)
    build_segmentation(self, config, host.OneFormerModel)
    self.post_init()


_PATCHES: tuple[tuple[type, type, Callable[..., None]], ...] = (
    (host.OneFormerModel, model.MendedOneFormerModel, _model_init),
    (host.OneFormerForUniversalSegmentation, model.MendedSegmentation, _segmentation_init),
)


def patch_oneformer() -> Callable[[], None]:
    """Let transformers' own OneFormer classes (and the Auto classes) build mended models; returns what undoes it.

    Models that exist already stay as they are: `hf_attn.apply(model, "neighborhood")` mends those.
    """
    before = []
    for original, mended, init in _PATCHES:
        names = {"__init__": init, "forward": vars(mended)["forward"]}
        names |= {name: value for name, value in vars(model.Mended).items() if not name.startswith("__")}
        for name, value in names.items():
            before.append((original, name, vars(original).get(name, _MISSING)))
            setattr(original, name, value)

    def undo() -> None:
        for owner, name, value in reversed(before):
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)
        before.clear()

    return undo


_MISSING: Any = object()
