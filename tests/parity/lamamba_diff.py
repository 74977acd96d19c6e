"""Parity adapter of LaMamba-Diff: blocks and networks of a golden file, through the model classes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from hf_attn.models.lamamba_diff import LaMambaDiffTransformer2DModel
from hf_attn.models.lamamba_diff.layers import LaMambaBlock
from hf_attn.models.lamamba_diff.paths import scan_paths
from hf_attn.models.lamamba_diff.pipeline_lamamba_diff import guided

HAS_TRITON = False
# Part of a name in the golden file -> part of a parameter's name.
BLOCK = (
    (r"(^|\.)ada\.", r"\1modulation."),
    (r"(^|\.)ln_(ssm|attn|mlp)\.", r"\1norm_\2."),
    (r"(^|\.)ssm\.dwconv\.", r"\1ssm.conv."),
    (r"(^|\.)ssm\.onorm\.", r"\1ssm.norm."),
)
NET = (
    (r"^patch\.", "patch_"),
    (r"^time\.", "time_"),
    (r"^label\.table$", "label_embed.weight"),
    (r"^enc\.(\d+)\.blocks\.", r"encoder.\1."),
    (r"^enc\.(\d+)\.down\.", r"down.\1."),
    (r"^dec\.(\d+)\.blocks\.", r"decoder.\1."),
    (r"^dec\.2\.up\.", "up.0."),
    (r"^dec\.3\.up\.", "up.1."),
    (r"^head\.expand_norm\.", "head.norm."),
)


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Cases by prefix: `.x` is a block, `.sample` a network; scan paths for a few sides."""
    results = {f"scan_paths_n{side}": scan_paths(side) for side in range(2, 33, 2)}
    for name, case in config.items():
        if f"{name}.x" in inputs:
            found = _block(inputs, name, case, config)
        elif f"{name}.sample" in inputs:
            found = _net(inputs, name, case, config)
        else:
            continue
        results.update({f"{name}.{key}": value for key, value in found.items()})
    return results


def _weights(inputs: dict[str, Tensor], name: str, rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    prefix, found = f"{name}.w.", {}
    for key, value in inputs.items():
        if key.startswith(prefix):
            key = key[len(prefix) :]
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            found[key] = value
    return found


def _block(inputs: dict[str, Tensor], name: str, case: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    block = LaMambaBlock(
        case["dim"],
        case["cond"],
        heads=case["heads"],
        window=min(case["ws"], case["res"]),
        shift=case["shift"],
        state_size=case["N"],
        ssm_ratio=config["ssm_ratio"],
        conv=config["d_conv"],
        mlp_ratio=config["mlp_ratio"],
        project=f"{name}.w.cond_proj.weight" in inputs,
    )
    block.load_state_dict(_weights(inputs, name, BLOCK))
    x, cond = (inputs[f"{name}.{key}"].clone().requires_grad_() for key in ("x", "cond"))
    out = block(x, cond)
    grad_x, grad_cond = torch.autograd.grad(out, (x, cond), inputs[f"{name}.grad_out"])
    with torch.no_grad():
        parts = {"ssm_out": block.ssm(x), "attn_out": block.attn(x)}
    return {"out": out, "grad_x": grad_x, "grad_cond": grad_cond, **parts}


def _net(inputs: dict[str, Tensor], name: str, case: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    latents, times, labels = (inputs[f"{name}.{key}"] for key in ("sample", "timestep", "class_labels"))
    model = LaMambaDiffTransformer2DModel(
        sample_size=case["res"],
        in_channels=latents.shape[1],
        out_channels=inputs[f"{name}.w.head.proj.weight"].shape[0],
        num_classes=case["ncls"],
        base_channels=case["dims"],
        depths=case["depths"],
        bottleneck_depth=case["bd"],
        num_heads=case["heads"],
        window_size=case["ws"],
        ssm_state_size=case["N"],
        ssm_ratio=config["ssm_ratio"],
        ssm_conv=config["d_conv"],
        mlp_ratio=config["mlp_ratio"],
    ).eval()
    model.load_state_dict(_weights(inputs, name, NET + BLOCK))
    with torch.no_grad():
        out = model(latents, times, labels).sample
        both = model(
            latents[:1].expand(2, -1, -1, -1), times[0], torch.stack([labels[0], torch.tensor(case["ncls"])])
        ).sample
    return {"out": out, "cfg_out": guided(both, latents.shape[1], config["cfg_scale"])}
