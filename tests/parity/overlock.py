"""Parity adapter of OverLoCK: every result of a golden file, through the public API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hf_attn  # noqa: F401  registers the model type
from hf_attn.models.overlock import ContMixBlock, OverlockConfig, OverlockForImageClassification
from hf_attn.models.overlock.contmix import OverlockDynamicBlock
from hf_attn.models.overlock.layers import OverlockRepConvBlock

HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Blocks with their gradients, and whole models."""
    results = {}
    for name, case in config["cases"].items():
        given = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
        weights = {key.removeprefix("w."): value for key, value in given.items() if key.startswith("w.")}
        function = _KINDS[case.get("kind", "model")]
        results |= {f"{name}.{key}": value for key, value in function(given, weights, case["cfg"]).items()}
    return results


def _load(block: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert not unexpected and all("num_batches_tracked" in key for key in missing), (missing, unexpected)
    return block.eval()


def _options(cfg: dict[str, Any]) -> dict[str, Any]:
    names = {"kernel": "kernel_size", "small_kernel": "smk_size"}
    names |= {name: name for name in ("mlp_ratio", "ls_init_value", "res_scale", "num_heads", "is_first", "is_last")}
    return {ours: cfg[theirs] for ours, theirs in names.items() if theirs in cfg}


def _static(given: dict[str, Tensor], weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(_load(OverlockRepConvBlock(cfg["dim"], **_options(cfg)), weights), given)


def _plug_in(given: dict[str, Tensor], weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(_load(ContMixBlock(cfg["dim"], **_options(cfg)), weights), given)


def _plain(block: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    x = given["x"].clone().requires_grad_()
    y = block(x)
    y.backward(given["grad_y"])
    return {"y": y, "grad_x": x.grad}


def _dynamic(given: dict[str, Tensor], weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    block = _load(OverlockDynamicBlock(cfg["dim"], cfg["ctx_dim"] // 4, **_options(cfg)), weights)
    x, context = (given[name].clone().requires_grad_() for name in ("x", "ctx"))
    out = block(x, context, given["ctx_res"])
    results, outs, grads = {}, [out], [given["grad_y"]]
    if isinstance(out, tuple):
        outs, grads = list(out), [given["grad_y"], given["grad_ctx_out"]]
        results["ctx_out"] = out[1]
    torch.autograd.backward(outs, grads)
    return results | {"y": outs[0], "grad_x": x.grad, "grad_ctx": context.grad, "grad_rpb2": block.rpb2.grad}


@torch.no_grad()
def _model(given: dict[str, Tensor], weights: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    names = {
        "depths": "depth",
        "sub_depths": "sub_depth",
        "embed_dims": "embed_dim",
        "kernel_sizes": "kernel_size",
        "mlp_ratios": "mlp_ratio",
        "sub_num_heads": "sub_num_heads",
        "sub_mlp_ratios": "sub_mlp_ratio",
        "projection_dim": "projection",
        "num_labels": "num_classes",
        "smk_size": "smk_size",
        "ls_init_values": "ls_init_value",
        "res_scale": "res_scale",
    }
    config = OverlockConfig(**{ours: cfg[theirs] for ours, theirs in names.items() if theirs in cfg})
    model = OverlockForImageClassification(config).eval().load_official_weights(weights)
    outputs = model.overlock(given["pixel_values"], output_hidden_states=True)
    logits = model(given["pixel_values"], output_aux_logits=True)
    return {
        "pre_features": outputs.hidden_states[2],
        "base": outputs.base_map,
        "overview": outputs.overview_map,
        "features": outputs.last_hidden_state,
        "logits": logits.logits,
        "aux_logits": logits.aux_logits,
    }


_KINDS = {"rep": _static, "cm": _plug_in, "dyn": _dynamic, "model": _model}
