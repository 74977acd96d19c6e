"""Bases of the vision backbones: a family writes its blocks and `feature_maps`; heads and backbone are these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from hf_attn.models.checkpoint import CardOnPush
from hf_attn.models.vision.official import OfficialNames, load_official


class VisionPreTrainedModel(CardOnPush, PreTrainedModel):
    """What all classes of a family share. A family sets `config_class`, `base_model_prefix` and the three below."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True

    # The class with `feature_maps`; heads and backbone hold one under `base_model_prefix`.
    model_class: ClassVar[type[PreTrainedModel]]
    official_names: ClassVar[OfficialNames]
    # How convolutions start: "torch" (uniform, torch's own) or "normal" (truncated normal, zero bias).
    conv_init: ClassVar[str] = "torch"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and self.conv_init == "normal"):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            if module.weight is not None:
                init.ones_(module.weight)
                init.zeros_(module.bias)
            if getattr(module, "running_mean", None) is not None:
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)

    def load_official_weights(self, state: Mapping) -> Self:
        """Load a state dict of the authors' code, in place; see `hf_attn.models.vision.official.load_official`."""
        load_official(self, state, self.official_names, prefix=f"{self.base_model_prefix}.")
        return self

    def reparameterize(self) -> Self:
        """Fold what inference can do without, in place: same outputs, fewer parameters; `config.deploy` becomes True.

        Every submodule with a method `reparameterize` folds itself, inner ones first; a saved model loads in this form.
        Raises RuntimeError in training mode: batch norms that still learn cannot be folded.
        """
        if self.training:
            raise RuntimeError(
                "reparameterize() folds batch norms with their running statistics; call model.eval() first"
            )
        if not self.config.deploy:
            for module in reversed(list(self.modules())):
                if module is not self and not isinstance(module, PreTrainedModel) and hasattr(module, "reparameterize"):
                    module.reparameterize()
            self.config.deploy = True
        return self

    def check_pixels(self, pixel_values: Tensor | None) -> Tensor:
        """Raise ValueError unless this is `[B, num_channels, H, W]` with H, W >= `config.minimum_size`."""
        channels, smallest = self.config.num_channels, self.config.minimum_size
        if pixel_values is None:
            raise ValueError("pixel_values is missing: give images as [B, C, H, W]")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must be [B, {channels}, H, W], got {list(pixel_values.shape)}")
        if min(pixel_values.shape[2:]) < smallest:
            raise ValueError(
                f"images of {tuple(pixel_values.shape[2:])} pixels are too small for {type(self).__name__}: height and "
                f"width must be at least {smallest}; resize them"
            )
        return pixel_values


class VisionModel(VisionPreTrainedModel):
    """A backbone without a head. A family defines `__init__(config, add_pooling_layer=True)` and the two below."""

    # Whether what only pooling needs (final norm, projection before the classifier) exists.
    add_pooling_layer: bool = True

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return self.config.stage_channels[-1]

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Output of the stem and of every stage, `[B, C, H, W]`, in the order of `config.stage_names`."""
        raise NotImplementedError

    def pool(self, last: Tensor) -> Tensor:
        """Last map `[B, C, H, W]` -> features `[B, num_features]`."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool | None = None, **unused: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple:
        """Last map and pooled features of images `[B, C, H, W]`; with `output_hidden_states` all maps."""
        maps = self.feature_maps(self.check_pixels(pixel_values))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=self.pool(maps[-1]) if self.add_pooling_layer else None,
            hidden_states=tuple(maps) if wanted else None,
        )


class VisionForImageClassification(VisionPreTrainedModel):
    """A linear classifier on the pooled features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        model = self.model_class(config)
        setattr(self, self.base_model_prefix, model)
        self.classifier = nn.Linear(model.num_features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Logits `[B, num_labels]` of images `[B, C, H, W]`, and the loss when `labels` are given.

        Args:
            labels: int `[B]` classes; float `[B, num_labels]` for several labels an image; see `config.problem_type`.
            output_hidden_states: also return the maps of stem and stages.
        """
        outputs = self.base_model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class VisionBackbone(BackboneMixin, VisionPreTrainedModel):
    """Maps of chosen stages, each with a norm of its own, for segmentation and detection models."""

    has_attentions = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_features = config.stage_channels
        setattr(self, self.base_model_prefix, self.model_class(config, add_pooling_layer=False))
        channels = dict(zip(config.stage_names, config.stage_channels, strict=True))
        self.hidden_states_norms = nn.ModuleDict(
            {stage: self.make_norm(channels[stage]) for stage in self.out_features if stage != "stem"}
        )
        self.post_init()

    def make_norm(self, channels: int) -> nn.Module:
        """The norm on an output `[B, channels, H, W]`."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **unused: Any
    ) -> BackboneOutput | tuple:
        """Maps of `out_features`, `[B, C, H, W]` each, of images of any size from `config.minimum_size` on."""
        maps = self.base_model.feature_maps(self.check_pixels(pixel_values))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        chosen = []
        for stage, found in zip(self.stage_names, maps, strict=True):
            if stage in self.out_features:
                norm = self.hidden_states_norms[stage] if stage in self.hidden_states_norms else nn.Identity()
                chosen.append(norm(found))
        return BackboneOutput(feature_maps=tuple(chosen), hidden_states=tuple(maps) if wanted else None)
