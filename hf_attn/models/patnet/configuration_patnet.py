"""Config of PATNet and its published variants."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_attn.models.host import LATER, Filled
from hf_attn.models.vision.configuration_vision import VisionConfig


def _variant(width: int, depths: list[int], act: str, drop_path_rate: float) -> dict[str, Any]:
    return {"embed_dim": width, "depths": depths, "hidden_act": act, "drop_path_rate": drop_path_rate}


@strict
class PatNetConfig(VisionConfig):
    """A backbone that convolves a quarter of its channels and attends with the rest (arXiv 2503.03148).

    Args:
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: blocks of the stages; the last stage has self-attention, the others channel gates.
        mlp_ratio: hidden width of the MLPs over that of the stage.
        n_div: a stage's first width // n_div channels are convolved, the others attend.
        feature_dim: width of the pooled features, before the classifier.
        hidden_act: activation of MLPs and head.
        use_channel_attn: False leaves the other channels untouched in all stages: the partial convolution alone.
        use_spatial_attn: spatial gates in the MLPs. The authors' configuration files have them off but for T1, their
            figure shows them in all stages.
        num_attention_heads: of the last stage.
        attention_dropout: of attention weights and output, in training.
        rpe_ratio: distances up to this many positions have a learned bias each; farther ones share.
        layer_scale_init_value: start of a learned factor on the MLP branch; 0: none.
    """

    model_type = "patnet"

    embed_dim: int = 64
    depths: Filled[list[int]] = LATER
    mlp_ratio: int | float = 2.0
    n_div: int = 4
    feature_dim: int = 1280
    hidden_act: str = "relu"
    use_channel_attn: bool = True
    use_spatial_attn: bool = True
    num_attention_heads: int = 4
    attention_dropout: float = 0.1
    rpe_ratio: int = 20
    layer_scale_init_value: float = 0.0
    crop_pct: float = 0.9

    thin_module: ClassVar[str] = "hf_attn.models.patnet"
    thin_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "PatNetModel",
        "AutoModelForImageClassification": "PatNetForImageClassification",
        "AutoBackbone": "PatNetBackbone",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "t0": _variant(32, [1, 2, 8, 2], "gelu", 0.0),
        "t1": _variant(48, [1, 2, 8, 2], "gelu", 0.02),
        "t2": _variant(64, [2, 2, 6, 4], "relu", 0.05),
        "s": _variant(96, [2, 2, 9, 4], "relu", 0.1),
        "m": _variant(128, [2, 3, 16, 4], "relu", 0.2),
        "l": _variant(160, [2, 3, 20, 4], "relu", 0.3),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.depths = [2, 2, 6, 4] if self.depths is None else self.depths
        super().__post_init__(**kwargs)

    @property
    def stage_channels(self) -> list[int]:
        widths = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        return [widths[0], *widths]

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        super().validate_architecture()
        for name in ("embed_dim", "n_div", "feature_dim", "num_attention_heads", "rpe_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.embed_dim < max(self.n_div, 2) or self.n_div < 2:
            raise ValueError(
                f"n_div={self.n_div} must be >= 2 and leave embed_dim={self.embed_dim} at least one channel to convolve"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be in [0, 1)")
        last = self.stage_channels[-1]
        attending = last - last // self.n_div
        if self.use_channel_attn and attending % self.num_attention_heads:
            raise ValueError(
                f"the {attending} attending channels of the last stage must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
