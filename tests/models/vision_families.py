"""The vision backbones at a size for tests; every row gets all tests of test_vision_backbones.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification

import hf_attn  # noqa: F401  registers the model types

# model_type -> fields of its config; four stages whose widths differ.
TINY: dict[str, dict[str, Any]] = {
    "biformer": {
        "embed_dims": [16, 24, 32, 48],
        "depths": [1, 1, 2, 1],
        "head_dim": 8,
        "n_win": 2,
        "topks": [1, 2, 4, -2],
    },
    "emov2": {
        "embed_dims": [16, 24, 32, 48],
        "depths": [1, 2, 2, 2],
        "expand_ratios": [2.0, 2.5, 3.0, 3.5],
        "head_dims": [8, 8, 16, 16],
        "window_size": 4,
        "layer_scale_init_value": 1.0,
    },
    "overlock": {
        "embed_dims": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "sub_depths": [2, 1],
        "kernel_sizes": [9, 7, 7, 5],
        "mlp_ratios": [2, 2, 2, 2],
        "sub_mlp_ratios": [2, 2],
        "sub_num_heads": [2, 2],
        "projection_dim": 32,
    },
    "patnet": {"embed_dim": 16, "depths": [1, 1, 2, 1], "feature_dim": 32},
}
FAMILIES = sorted(TINY)
# Families with attention layers of the usual kind, which the attention interface of transformers reaches.
ATTENTION = [family for family in FAMILIES if family != "overlock"]


def config_of(family: str, **changes: Any) -> Any:
    """Config of a tiny model of a family."""
    return AutoConfig.for_model(family, **{**TINY[family], "num_labels": 5, **changes})


def classifier(family: str, **changes: Any) -> torch.nn.Module:
    """A tiny classifier with weights and statistics that nothing hides behind."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config_of(family, **changes))
    stir(model)
    return model.eval()


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Give vectors and batch-norm statistics values that are not 0 and 1."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
        elif "lookup_table" in name:
            tensor.normal_()


def images(height: int = 64, width: int = 64, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def macs(build: Callable[[], torch.nn.Module], size: int) -> float:
    """Products of convolutions, linear layers and attention of one image, in units of 1e9; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        model, images = build().eval(), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops() / 2e9
