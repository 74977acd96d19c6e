"""Parity adapter of EMOv2: every result of a golden file, through the public API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_attn  # noqa: F401  registers the model type
from hf_attn.models.emov2 import EMOv2Config, EMOv2ForImageClassification
from hf_attn.models.emov2.layers import EMOv2Block

HAS_TRITON = False
# Codes of the official constructor.
_EXPANSIONS = {0: "conv", 1: "remote", 2: "close", 3: "hybrid"}
_STAGES = ("bn", "bn", "ln", "ln"), ("silu", "silu", "gelu", "gelu")


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Blocks with their gradients, and whole models."""
    results = {}
    for name, case in config["cases"].items():
        if f"{name}.pixel_values" in inputs:
            found = _model(inputs[f"{name}.pixel_values"], _weights(inputs, name), case["cfg"])
        else:
            found = _block(inputs[f"{name}.x"], inputs[f"{name}.grad_y"], _weights(inputs, name), case["cfg"])
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


def _weights(inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}.w."
    return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}


def _block(x: Tensor, grad: Tensor, weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    block = EMOv2Block(
        cfg["dim_in"],
        cfg["dim_out"],
        expand_ratio=cfg["exp_ratio"],
        expansion=_EXPANSIONS[cfg["hybrid_eops"][0]],
        norm=cfg["norm_layer"].removesuffix("_2d"),
        act=cfg["act_layer"],
        kernel=cfg["dw_ks"],
        stride=cfg["stride"],
        head_dim=cfg["dim_head"],
        window=cfg["window_size"],
        qkv_bias=cfg["qkv_bias"],
        has_skip=cfg["has_skip"],
    ).eval()
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert not unexpected and all("num_batches_tracked" in key for key in missing), (missing, unexpected)
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(grad)
    return {"y": y, "grad_x": x.grad}


@torch.no_grad()
def _model(pixels: Tensor, weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    norms, acts = _STAGES
    model = EMOv2ForImageClassification(
        EMOv2Config(
            num_labels=cfg["num_classes"],
            depths=cfg["depths"],
            embed_dims=cfg["embed_dims"],
            expand_ratios=cfg["exp_ratios"],
            head_dims=cfg["dim_heads"],
            window_size=cfg["window_sizes"],
            kernel_sizes=cfg["dw_kss"],
            expand_ops=[_EXPANSIONS[codes[0]] for codes in cfg["hybrid_eopss"]],
            norm_types=list(norms),
            act=list(acts),
            qkv_bias=cfg["qkv_bias"],
        )
    ).eval()
    output = model.load_official_weights(weights)(pixels, output_hidden_states=True)
    return {"logits": output.logits, **{f"stage{i}": maps for i, maps in enumerate(output.hidden_states)}}
