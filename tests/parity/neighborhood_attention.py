"""Parity adapter of neighborhood attention: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops

NOT_YET = ("dinat.*",)


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
    return {}
