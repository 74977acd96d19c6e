"""Config of BiFormer and its published variants."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_attn.models.host import LATER, Filled
from hf_attn.models.vision.configuration_vision import VisionConfig

_STEMS = ("conv", "patch")
_LAYOUTS = ("legacy", "nchw")

# Values of `topks` that stand for another mixer than bi-level routing.
FULL, FULL_LEPE, CONVOLUTION = -1, -2, 0


def _variant(width: int, depths: list[int], **others: Any) -> dict[str, Any]:
    return {"embed_dims": [width * 2**stage for stage in range(4)], "depths": depths, **others}


@strict
class BiFormerConfig(VisionConfig):
    """A four-stage backbone whose attention first picks regions, then attends to their tokens (arXiv 2303.08810).

    Args:
        embed_dims: channels of the stages.
        depths: blocks of the stages.
        mlp_ratios: hidden width of the MLPs over that of the stage.
        head_dim: width of a head where attention is routed; its scale is nevertheless (query width)^-0.5.
        n_win: regions a side of the map, in every stage; regions grow with the image.
        region_size: tokens a side of a region instead, in every stage, whatever the image; None: `n_win` counts.
        topks: regions that every region reads, by stage, at most n_win^2; or -2 (full attention of 8 heads, with a
            depthwise convolution of its input added), -1 (the same without it), 0 (convolutions only).
        qk_dims: width of queries and keys by stage; None: that of the stage.
        side_dwconv: kernel of the depthwise convolution added to the attention ("LCE"), odd; 0: none.
        before_attn_dwconv: kernel of the positional depthwise convolution before it, odd; 0: none.
        layer_scale_init_value: start of a learned factor on each branch; negative: none.
        stem: "conv" (two strided 3x3 convolutions) or "patch" (4x4 patches and 2x2 merging, as in BiFormer-STL).
        attention_layout: "legacy" (the released weights) or "nchw" (refactored: pads after the projection).
        auto_pad: pad maps to whole regions; otherwise sizes that do not divide raise.
        layer_norm_eps: of the LayerNorms.
    """

    model_type = "biformer"

    embed_dims: Filled[list[int]] = LATER
    depths: Filled[list[int]] = LATER
    mlp_ratios: Filled[list[int | float]] = LATER
    head_dim: int = 32
    n_win: int = 7
    region_size: int | None = None
    topks: Filled[list[int]] = LATER
    qk_dims: list[int] | None = None
    side_dwconv: int = 5
    before_attn_dwconv: int = 3
    layer_scale_init_value: float = -1.0
    stem: str = "conv"
    attention_layout: str = "legacy"
    auto_pad: bool = True
    layer_norm_eps: float = 1e-6

    thin_module: ClassVar[str] = "hf_attn.models.biformer"
    thin_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "BiFormerModel",
        "AutoModelForImageClassification": "BiFormerForImageClassification",
        "AutoBackbone": "BiFormerBackbone",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _variant(64, [2, 2, 8, 2]),
        "small": _variant(64, [4, 4, 18, 4], drop_path_rate=0.15),
        "base": _variant(96, [4, 4, 18, 4]),
        "stl": _variant(
            96, [2, 2, 6, 2], mlp_ratios=[4, 4, 4, 4], stem="patch", before_attn_dwconv=0, drop_path_rate=0.1
        ),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.embed_dims = [64, 128, 256, 512] if self.embed_dims is None else self.embed_dims
        self.depths = [2, 2, 8, 2] if self.depths is None else self.depths
        self.mlp_ratios = [3] * len(self.depths) if self.mlp_ratios is None else self.mlp_ratios
        self.topks = [1, 4, 16, FULL_LEPE] if self.topks is None else self.topks
        super().__post_init__(**kwargs)

    @property
    def stage_channels(self) -> list[int]:
        return [self.embed_dims[0], *self.embed_dims]

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        super().validate_architecture()
        stages = len(self.depths)
        for name in ("embed_dims", "mlp_ratios", "topks", "qk_dims"):
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f"{name} has {len(value)} entries, but depths has {stages}: one for every stage")
        for name, allowed in (("stem", _STEMS), ("attention_layout", _LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        for name in ("side_dwconv", "before_attn_dwconv"):
            kernel = getattr(self, name)
            if kernel < 0 or (kernel and kernel % 2 == 0):
                raise ValueError(f"{name}={kernel} must be odd, or 0 for none")
        if self.n_win < 1 or (self.region_size is not None and self.region_size < 1):
            raise ValueError(f"n_win={self.n_win} and region_size={self.region_size} must be >= 1")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be > 0")
        for stage in range(stages):
            self._validate_stage(stage)

    def _validate_stage(self, stage: int) -> None:
        width, top_k = self.embed_dims[stage], self.topks[stage]
        queries = self.query_width(stage)
        if top_k < FULL_LEPE:
            raise ValueError(f"topks[{stage}]={top_k} is unknown; allowed: >= 1, or -2, -1, 0")
        if top_k in (FULL, FULL_LEPE) and width % 8:
            raise ValueError(f"embed_dims[{stage}]={width} must be a multiple of 8, the heads of full attention")
        if top_k > 0:
            if width % self.head_dim or queries % (width // self.head_dim):
                raise ValueError(
                    f"embed_dims[{stage}]={width} must be a multiple of head_dim={self.head_dim}, and the query width "
                    f"{queries} a multiple of the {max(width // self.head_dim, 1)} heads"
                )
            if self.region_size is None and top_k > self.n_win**2:
                raise ValueError(f"topks[{stage}]={top_k} exceeds the n_win^2 = {self.n_win**2} regions of a map")

    def query_width(self, stage: int) -> int:
        """Width of queries and keys in a stage."""
        return self.embed_dims[stage] if self.qk_dims is None else self.qk_dims[stage]
