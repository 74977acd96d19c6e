"""Parity adapter of PATNet: every result of a golden file, through the public classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attn.models.patnet import PatNetConfig, PatNetForImageClassification
from hf_attn.models.patnet.layers import PartialAttention, SpatialGate

HAS_TRITON = False
KINDS = {"se": "channel", "self": "self"}


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of all cases; `kind` is pat (partial attention), sp (spatial gate) or absent (a model)."""
    results: dict[str, Tensor] = {}
    for name, case in config["cases"].items():
        mine = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
        weights = {key.removeprefix("w."): value for key, value in mine.items() if key.startswith("w.")}
        cfg = case["cfg"]
        if "kind" in case:
            layer = SpatialGate(cfg["dim"]) if case["kind"] == "sp" else _partial(cfg)
            found = _layer(layer, mine, weights)
        else:
            found = _model(mine, weights, cfg)
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


def _heads(cfg: dict) -> int:
    return 4 if cfg["patnet_t0"] else 6


def _partial(cfg: dict) -> PartialAttention:
    config = PatNetConfig(n_div=cfg["n_div"], num_attention_heads=_heads(cfg))
    config._attn_implementation = "sdpa"
    return PartialAttention(config, cfg["dim"], KINDS[cfg["channel_type"]])


def _layer(layer: nn.Module, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    missing, unexpected = layer.eval().load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = inputs["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_y"])
    return {"y": y, "grad_x": x.grad}


def _model(inputs: dict[str, Tensor], weights: dict[str, Tensor], cfg: dict) -> dict[str, Tensor]:
    config = PatNetConfig(
        num_labels=cfg["num_classes"],
        embed_dim=cfg["embed_dim"],
        depths=cfg["depths"],
        mlp_ratio=cfg["mlp_ratio"],
        n_div=cfg["n_div"],
        feature_dim=cfg["feature_dim"],
        hidden_act=cfg["act_layer"].lower(),
        use_spatial_attn=cfg["use_spatial_attn"],
        num_attention_heads=_heads(cfg),
        drop_path_rate=cfg["drop_path_rate"],
    )
    model = PatNetForImageClassification(config).eval().load_official_weights(weights)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], output_hidden_states=True)
    stages = {f"stage{index}": found for index, found in enumerate(outputs.hidden_states) if index}
    return {**stages, "logits": outputs.logits}
