"""Parity adapter of BiFormer: every result of a golden file, through the public classes."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.models.biformer import BiFormerConfig, BiFormerForImageClassification
from hf_attn.models.biformer.layers import BilevelRoutingAttention, BilevelRoutingAttentionNchw
from hf_attn.ops import select_regions

# Heads of the golden cases are narrower than the kernels take.
HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of all cases; `kind` is legacy, nchw (one attention layer) or model."""
    results: dict[str, Tensor] = {}
    for name, case in config["cases"].items():
        mine = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
        weights = {key.removeprefix("w."): value for key, value in mine.items() if key.startswith("w.")}
        found = (_model if case["kind"] == "model" else _layer)(mine, weights, case)
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


def _layer(inputs: dict[str, Tensor], weights: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    cfg, nchw = case["cfg"], case["kind"] == "nchw"
    config = BiFormerConfig(
        embed_dims=[cfg["dim"]],
        depths=[1],
        head_dim=cfg["dim"] // cfg["num_heads"],
        n_win=cfg["n_win"],
        topks=[cfg["topk"]],
        side_dwconv=cfg["side_dwconv"],
        qk_dims=[cfg.get("qk_dim") or cfg["dim"]],
        auto_pad=cfg.get("auto_pad", False),
        attention_layout=case["kind"],
    )
    config._attn_implementation = "sdpa"
    config.validate_architecture()
    layer = (BilevelRoutingAttentionNchw if nchw else BilevelRoutingAttention)(config, 0).eval()
    layer.load_state_dict(weights)
    x = inputs["x"].clone().requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nchw else layer(x)
    y.backward(inputs["grad_y"])
    weight = "qkv_linear.weight" if nchw else "qkv.qkv.weight"
    results = {"y": y, "grad_x": x.grad, f"grad_{weight}": layer.get_parameter(weight).grad}
    return results if nchw else {**results, "route_idx": _routes(layer, x.detach())}


def _routes(layer: BilevelRoutingAttention, x: Tensor) -> Tensor:
    with torch.no_grad():
        padded, region = layer.to_whole_regions(x)
        query, key, _ = (t.unflatten(-1, (layer.num_heads, -1)) for t in layer.qkv(padded))
    return select_regions(query, key, region_size=region, top_k=layer.top_k)


def _model(inputs: dict[str, Tensor], weights: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    cfg = case["cfg"]
    config = BiFormerConfig(
        num_labels=cfg["num_classes"],
        embed_dims=cfg["embed_dim"],
        depths=cfg["depth"],
        mlp_ratios=cfg["mlp_ratios"],
        head_dim=cfg["head_dim"],
        n_win=cfg["n_win"],
        topks=cfg["topks"],
        qk_dims=cfg["qk_dims"],
        side_dwconv=cfg["side_dwconv"],
        before_attn_dwconv=cfg["before_attn_dwconv"],
        auto_pad=cfg.get("auto_pad", False),
    )
    model = BiFormerForImageClassification(config).eval().load_official_weights(weights)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], output_hidden_states=True)
    stages = {f"stage{index}": found for index, found in enumerate(outputs.hidden_states) if index}
    return {**stages, "logits": outputs.logits}
