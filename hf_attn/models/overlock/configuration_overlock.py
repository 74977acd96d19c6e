"""Config of OverLoCK and its published variants."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_attn.checks import require_int, require_one_of
from hf_attn.models.host import LATER, Filled
from hf_attn.models.vision.configuration_vision import VisionConfig

# Large kernels for which dilated branches are defined.
KERNELS = (5, 7, 9, 11, 13, 15, 17, 19)
BACKENDS = ("auto", "tiled", "dense")


def _variant(
    depths: list[int], sub_depths: list[int], embed_dims: list[int], heads: list[int], crop_pct: float, drop_path: float
) -> dict[str, Any]:
    return {
        "depths": depths,
        "sub_depths": sub_depths,
        "embed_dims": embed_dims,
        "sub_num_heads": heads,
        "crop_pct": crop_pct,
        "drop_path_rate": drop_path,
    }


@strict
class OverlockConfig(VisionConfig):
    """Base-Net (stages 1 to 3), Overview-Net (a coarse stage 4) and Focus-Net (stages 3 and 4 again, dynamic kernels).

    Args:
        embed_dims: channels of the four stages; a quarter of the last is the width of the context.
        depths: blocks of Base-Net's three stages and of Overview-Net.
        sub_depths: blocks of Focus-Net's two stages.
        kernel_sizes: large kernels of the four stages, odd, 5 to 19; Focus-Net has those of stages 3 and 4.
        mlp_ratios: hidden width of the MLPs of Base-Net and Overview-Net over the stage's.
        sub_mlp_ratios: the same in Focus-Net.
        sub_num_heads: half the number of heads of Focus-Net's dynamic kernels.
        smk_size: the small dynamic window, odd, 3 or more and at most the large one.
        ls_init_values: start of the layer scales by stage; None for none.
        res_scale: scale the skip of a block instead of its branch.
        projection_dim: channels before the classifier.
        use_aux_head: a second classifier on the overview, in training only.
        aux_loss_weight: its share of the loss.
        na_backend: how window weights are applied: "tiled" (a box of keys for a tile of queries), "dense" (one matrix
            over the whole map), "auto" for dense on the smallest maps only.
    """

    model_type = "overlock"

    embed_dims: Filled[list[int]] = LATER
    depths: Filled[list[int]] = LATER
    sub_depths: Filled[list[int]] = LATER
    kernel_sizes: Filled[list[int]] = LATER
    mlp_ratios: Filled[list[int | float]] = LATER
    sub_mlp_ratios: Filled[list[int | float]] = LATER
    sub_num_heads: Filled[list[int]] = LATER
    smk_size: int = 5
    ls_init_values: Filled[list[int | float | None]] = LATER
    res_scale: bool = True
    projection_dim: int = 1024
    use_aux_head: bool = True
    aux_loss_weight: float = 0.4
    na_backend: Literal["auto", "tiled", "dense"] = "auto"
    crop_pct: float = 0.925

    thin_module: ClassVar[str] = "hf_attn.models.overlock"
    thin_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "OverlockModel",
        "AutoModelForImageClassification": "OverlockForImageClassification",
        "AutoBackbone": "OverlockBackbone",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "xt": _variant([2, 2, 3, 2], [6, 2], [56, 112, 256, 336], [4, 6], 0.925, 0.1),
        "t": _variant([4, 4, 6, 2], [12, 2], [64, 128, 256, 512], [4, 8], 0.95, 0.15),
        "s": _variant([6, 6, 8, 3], [16, 3], [64, 128, 320, 512], [8, 16], 0.95, 0.4),
        "b": _variant([8, 8, 10, 4], [20, 4], [80, 160, 384, 576], [6, 9], 0.975, 0.5),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        defaults = {
            **self.presets["xt"],
            "kernel_sizes": [17, 15, 13, 7],
            "mlp_ratios": [4, 4, 4, 4],
            "sub_mlp_ratios": [3, 3],
            "ls_init_values": [None, None, 1, 1],
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def context_dim(self) -> int:
        """Channels of the context that flows through Focus-Net."""
        return self.embed_dims[3] // 4

    @property
    def stage_channels(self) -> list[int]:
        first, second, third, fourth = self.embed_dims
        return [first, first, second, third + self.context_dim, fourth + self.context_dim]

    def validate_architecture(self) -> None:
        """Raise ValueError for fields that do not fit together."""
        super().validate_architecture()
        fours = ("embed_dims", "depths", "kernel_sizes", "mlp_ratios", "ls_init_values")
        twos = ("sub_depths", "sub_mlp_ratios", "sub_num_heads")
        for names, count in ((fours, 4), (twos, 2)):
            for name in names:
                if len(getattr(self, name)) != count:
                    raise ValueError(f"{name} must have {count} entries, got {getattr(self, name)}")
        for name in ("depths", "sub_depths"):
            for entry in getattr(self, name):
                require_int(name, entry, 1)
        for stage, kernel in enumerate(self.kernel_sizes):
            if kernel not in KERNELS:
                raise ValueError(f"kernel_sizes[{stage}]={kernel} must be odd, one of {', '.join(map(str, KERNELS))}")
        largest = min(self.kernel_sizes[2:])
        if self.smk_size % 2 == 0 or not 3 <= self.smk_size <= largest:
            raise ValueError(f"smk_size={self.smk_size} must be odd, from 3 to the smaller large window, {largest}")
        if self.embed_dims[0] % 2 or self.embed_dims[3] % 4:
            raise ValueError(
                f"embed_dims={self.embed_dims} must have an even first entry, and its last be a multiple of 4"
            )
        for stage, heads in zip((2, 3), self.sub_num_heads, strict=True):
            if heads < 1 or self.embed_dims[stage] % (4 * heads):
                raise ValueError(
                    f"embed_dims[{stage}]={self.embed_dims[stage]} must be a multiple of 4 x sub_num_heads = "
                    f"{4 * heads}: two halves of {2 * heads} heads each"
                )
        require_one_of("na_backend", self.na_backend, BACKENDS)
