"""Config of the vision backbones: stages, image processor, presets."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from hf_attn.checks import did_you_mean
from hf_attn.models.checkpoint import ThinFileConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@strict
class VisionConfig(ThinFileConfig, BackboneConfigMixin, PreTrainedConfig):
    """Fields of all vision backbones; a family adds its own, its `presets` and its `validate_architecture`.

    `stage_names` are stem, stage1, stage2 ...: one stage for every entry of `depths`, a field of the family.
    `out_features` or `out_indices` (keywords, as everywhere in transformers) choose what AutoBackbone returns.

    Args:
        num_channels: channels of the input.
        image_size: side the published weights were trained at, pixels; sets the image processor, not the model.
        crop_pct: share of the resized image that the centre crop keeps in evaluation.
        drop_path_rate: stochastic depth of the last block; earlier blocks have a linearly rising share of it.
        initializer_range: standard deviation of the (truncated) normal initialisation.
        deploy: build reparameterised blocks, as `reparameterize()` leaves them.
    """

    # Smallest height and width, pixels.
    minimum_size: ClassVar[int] = 32
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    num_channels: int = 3
    image_size: int = 224
    crop_pct: float = 0.875
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    deploy: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def stage_channels(self) -> list[int]:
        """Channels of the stem and of every stage, in the order of `stage_names`."""
        raise NotImplementedError

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VisionConfig:
        """A published variant by name; `changes` replace single fields. Raises ValueError for unknown names."""
        if name not in cls.presets:
            raise ValueError(
                f"unknown preset {name!r}{did_you_mean(name, list(cls.presets))}; presets: {', '.join(cls.presets)}"
            )
        return cls(**{**cls.presets[name], **changes})

    def image_processor(self, **changes: Any) -> Any:
        """The image processor of evaluation: bicubic resize to image_size / crop_pct, centre crop, ImageNet statistics.

        Works on PIL and numpy alone. `changes` replace single arguments of ConvNextImageProcessorPil. Save it beside
        the model (`save_pretrained`), and `pipeline("image-classification", folder)` finds it.
        """
        from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

        # From 384 pixels on, that class resizes straight to the square, as the ImageNet recipes of that size do.
        fields = {
            "size": {"shortest_edge": self.image_size},
            "crop_pct": self.crop_pct,
            "resample": 3,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        }
        return ConvNextImageProcessorPil(**{**fields, **changes})
