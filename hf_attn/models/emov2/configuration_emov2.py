"""Config of EMOv2 and its published variants."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_attn.checks import require_one_of
from hf_attn.models.host import LATER, Filled
from hf_attn.models.vision.configuration_vision import VisionConfig

ACTIVATIONS = ("silu", "gelu", "relu")
NORMS = ("bn", "ln")
EXPANSIONS = ("conv", "close", "remote", "hybrid")


def _variant(
    depths: list[int], embed_dims: list[int], expand_ratios: list[float], head_dims: list[int], **others: Any
) -> dict[str, Any]:
    sizes = {"depths": depths, "embed_dims": embed_dims, "expand_ratios": expand_ratios, "head_dims": head_dims}
    return {**sizes, "drop_path_rate": 0.05, **others}


_1M = _variant([2, 2, 8, 3], [32, 48, 80, 180], [2.0, 2.5, 3.0, 3.5], [16, 16, 20, 20], drop_path_rate=0.04036)
_2M = _variant([3, 3, 9, 3], [32, 48, 120, 200], [2.0, 2.5, 3.0, 3.5], [16, 16, 20, 20])
_5M = _variant([3, 3, 9, 3], [48, 72, 160, 288], [2.0, 3.0, 4.0, 4.0], [16, 24, 32, 32])
# EMO, the predecessor: smaller kernels in the first stages, remote windows only.
_V1 = {"kernel_sizes": [3, 3, 5, 5], "expand_ops": ["conv", "conv", "remote", "remote"]}


@strict
class EMOv2Config(VisionConfig):
    """A stem and stages of one block, an inverted residual whose expansion is a convolution or window attention.

    Every list has one entry a stage.

    Args:
        embed_dims: channels of the stages; the stem has half of the first.
        depths: blocks of the stages, the first of which has stride 2 and a convolution as its expansion.
        expand_ratios: width of a block's middle over its input; the first block of a stage has twice the ratio.
        head_dims: channels of a head's queries and keys, read by stages with attention.
        window_size: rows and columns of a window, one for all stages or a list; 0: the whole map.
        norm_types: "bn" or "ln", the norm at the entry of the blocks.
        act: "silu", "gelu" or "relu", the activation of the expansions.
        kernel_sizes: of the depthwise convolutions, odd.
        expand_ops: "conv", or attention in "close" or "remote" windows or in both, "hybrid".
        qkv_bias: biases in the expansions.
        layer_scale_init_value: start of the factor on every block's branch. The published 1e-6 needs the published
            recipe: small models that start from nothing learn faster from 1.
    """

    model_type = "emov2"

    embed_dims: Filled[list[int]] = LATER
    depths: Filled[list[int]] = LATER
    expand_ratios: Filled[list[int | float]] = LATER
    head_dims: Filled[list[int]] = LATER
    window_size: int | list[int] = 7
    norm_types: Filled[list[str]] = LATER
    act: Filled[list[str]] = LATER
    kernel_sizes: Filled[list[int]] = LATER
    expand_ops: Filled[list[str]] = LATER
    qkv_bias: bool = True
    layer_scale_init_value: float = 1e-6

    thin_module: ClassVar[str] = "hf_attn.models.emov2"
    thin_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "EMOv2Model",
        "AutoModelForImageClassification": "EMOv2ForImageClassification",
        "AutoBackbone": "EMOv2Backbone",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "1m": _1M,
        "2m": _2M,
        "5m": _5M,
        "5m-512": {**_5M, "window_size": 8, "image_size": 512},
        "20m": _variant([3, 3, 13, 3], [64, 128, 320, 448], [2.0, 3.0, 4.0, 4.0], [16, 32, 32, 32], drop_path_rate=0.1),
        "50m": _variant([5, 8, 20, 7], [64, 128, 384, 512], [2.0, 3.0, 4.0, 4.0], [16, 32, 32, 32], drop_path_rate=0.2),
        "v1-1m": {**_1M, **_V1},
        "v1-2m": {**_2M, **_V1},
        "v1-5m": {**_5M, **_V1},
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.embed_dims = [48, 72, 160, 288] if self.embed_dims is None else self.embed_dims
        self.depths = [3, 3, 9, 3] if self.depths is None else self.depths
        self.expand_ratios = [2.0, 3.0, 4.0, 4.0] if self.expand_ratios is None else self.expand_ratios
        self.head_dims = [16, 24, 32, 32] if self.head_dims is None else self.head_dims
        self.norm_types = ["bn", "bn", "ln", "ln"] if self.norm_types is None else self.norm_types
        self.act = ["silu", "silu", "gelu", "gelu"] if self.act is None else self.act
        self.kernel_sizes = [5] * len(self.depths) if self.kernel_sizes is None else self.kernel_sizes
        self.expand_ops = ["conv", "conv", "hybrid", "hybrid"] if self.expand_ops is None else self.expand_ops
        super().__post_init__(**kwargs)

    @property
    def stage_channels(self) -> list[int]:
        return [self.embed_dims[0] // 2, *self.embed_dims]

    @property
    def window_sizes(self) -> list[int]:
        """Window of every stage."""
        if isinstance(self.window_size, int):
            return [self.window_size] * len(self.depths)
        return list(self.window_size)

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        super().validate_architecture()
        stages = len(self.depths)
        names = ("embed_dims", "expand_ratios", "head_dims", "norm_types", "act", "kernel_sizes", "expand_ops")
        for name, value in [(name, getattr(self, name)) for name in names] + [("window_size", self.window_sizes)]:
            if len(value) != stages:
                raise ValueError(f"{name} has {len(value)} entries, but depths has {stages}: one for every stage")
        for stage in range(stages):
            require_one_of(f"norm_types[{stage}]", self.norm_types[stage], NORMS)
            require_one_of(f"act[{stage}]", self.act[stage], ACTIVATIONS)
            require_one_of(f"expand_ops[{stage}]", self.expand_ops[stage], EXPANSIONS)
            if self.depths[stage] < 1 or self.kernel_sizes[stage] < 1 or self.kernel_sizes[stage] % 2 == 0:
                raise ValueError(
                    f"depths[{stage}]={self.depths[stage]} must be >= 1 and "
                    f"kernel_sizes[{stage}]={self.kernel_sizes[stage]} odd"
                )
        if self.embed_dims[0] % 2:
            raise ValueError(f"embed_dims[0]={self.embed_dims[0]} must be even: the stem has half as many channels")
