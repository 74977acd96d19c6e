"""Parity adapter of neighborhood attention: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DinatConfig

from hf_attn import ops
from hf_attn.models.dinat import DinatAttnBackbone, DinatAttnForImageClassification

# Cases with heads of 12 features, which the Triton kernels refuse; tests/triton_paths has cases that they take.
HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of all cases; a case is told by its tensors: weights `w` are unfused, `pixel_values` a model."""
    results = {}
    for name, case in config["cases"].items():
        tensors = {key.removeprefix(f"{name}."): x for key, x in inputs.items() if key.startswith(f"{name}.")}
        compute = _model if "pixel_values" in tensors else _unfused if "w" in tensors else _fused
        results |= {f"{name}.{key}": x for key, x in compute(tensors, case).items()}
    return results


def _fused(tensors: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    window = {name: tuple(case[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != "grad_out"}
    out, lse = ops.neighborhood_attention(
        leaves["q"], leaves["k"], leaves["v"], rpb=leaves.get("rpb"), scale=case.get("scale"), return_lse=True,
        additional_keys=leaves.get("add_k"), additional_values=leaves.get("add_v"), **window,
    )  # fmt: skip
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["grad_out"])
    mask = ops.neighborhood_mask(case["space"], **window)
    mask = torch.nn.functional.pad(mask, (0, case.get("extra", 0)), value=True)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "lse": lse, "mask": mask, **named}


def _unfused(tensors: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    window = {"kernel_size": case["kernel_size"], "dilation": case["dilation"]}
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("q", "k", "rpb", "w", "v") if name in tensors}
    scores = ops.na_qk(leaves["q"], leaves["k"], rpb=leaves.get("rpb"), **window)
    mixed = ops.na_av(leaves["w"], leaves["v"], **window)
    upstream = tensors["grad_scores"], tensors["grad_av_out"]
    grads = torch.autograd.grad((scores, mixed), list(leaves.values()), upstream)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"scores": scores, "av_out": mixed, **named}


def _model(tensors: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    """Logits of a classifier and maps of the backbone with the same encoder, from weights under transformers' names."""
    config = DinatConfig(**case["config"])
    weights = {name.removeprefix("w."): x for name, x in tensors.items() if name.startswith("w.")}
    model = DinatAttnForImageClassification(config).eval()
    model.load_state_dict(weights)
    config.out_features = [f"stage{i + 1}" for i in range(len(config.depths))]
    backbone = DinatAttnBackbone(config).eval()
    encoder = {name.removeprefix("dinat."): x for name, x in weights.items() if name.startswith("dinat.")}
    norms = {name: x for name, x in tensors.items() if name.startswith("backbone_norms.")}
    encoder |= {name.replace("backbone_norms", "hidden_states_norms"): x for name, x in norms.items()}
    missing = backbone.load_state_dict(encoder, strict=False).missing_keys
    assert not missing, missing
    with torch.no_grad():
        maps = backbone(tensors["pixel_values"]).feature_maps
        logits = model(tensors["pixel_values"]).logits
    return {"logits": logits, **{f"feature_maps.{i}": x for i, x in enumerate(maps)}}
