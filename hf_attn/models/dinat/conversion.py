"""The published DiNAT variants, and checkpoints of the official NAT / DiNAT code under transformers' names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import DinatConfig

from hf_attn.checks import require_one_of


def _dilations(first: int, second: int, third: int, depth: int) -> list[list[int]]:
    return [[1, first, 1], [1, second] * 2, [1, third] * (depth // 2), [1] * 5]


def _variant(embed_dim: int, heads: int, mlp_ratio: float, drop_path: float, **options: Any) -> dict[str, Any]:
    depth = options.pop("depth", 18)
    return {
        "embed_dim": embed_dim,
        "depths": [3, 4, depth, 5],
        "num_heads": [heads * 2**stage for stage in range(4)],
        "mlp_ratio": float(mlp_ratio),
        "drop_path_rate": drop_path,
        "kernel_size": 7,
        "dilations": _dilations(8, 4, 2, depth),
        **options,
    }


# Arguments of DinatConfig for every published variant (arXiv 2209.15001, tables 1 and 7; OneFormer, arXiv 2211.06220).
VARIANTS: dict[str, dict[str, Any]] = {
    "mini": _variant(64, 2, 3, 0.2, depth=6),
    "tiny": _variant(64, 2, 3, 0.2),
    "small": _variant(96, 3, 2, 0.3),
    "base": _variant(128, 4, 2, 0.5, layer_scale_init_value=1e-5),
    "large": _variant(192, 6, 2, 0.35),
    "large_384": _variant(192, 6, 2, 0.35, dilations=_dilations(13, 6, 3, 18)),
    "large_11x11_384": _variant(192, 6, 2, 0.35, kernel_size=11, dilations=_dilations(8, 4, 2, 18)),
    "oneformer_large": _variant(
        192,
        6,
        2,
        0.3,
        kernel_size=11,
        dilations=[[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]],
    ),
}

# Official name -> transformers' name, in this order; `attn.qkv` and `gamma` need more than a name.
_RULES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"encoder.levels.\1.layers.\2."),
    (r"^levels\.(\d+)\.downsample\.", r"encoder.levels.\1.downsample."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^norm(\d)\.", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}."),
)
_LAYER = r"(layernorm_before|layernorm_after|attention\.output\.dense|intermediate\.dense|output\.dense)"
_KNOWN = re.compile(
    r"(embeddings\.(patch_embeddings\.projection\.[01]|norm)|layernorm|hidden_states_norms\.stage\d"
    rf"|encoder\.levels\.\d+\.(downsample\.(reduction|norm)|layers\.\d+\.{_LAYER}))\.(weight|bias)"
    r"|encoder\.levels\.\d+\.layers\.\d+\.attention\.self\.rpb"
)


def convert_state_dict(
    state: dict[str, Tensor], config: DinatConfig, *, target: str = "classification"
) -> dict[str, Tensor]:
    """A state dict of the official code under the names of transformers.

    Args:
        state: tensors by official name (`levels.0.blocks.0.attn.qkv.weight`, ...), without a `model` or `state_dict`
            level; a `backbone.` prefix, as in detection checkpoints, is dropped.
        config: of the model that will load it.
        target: "classification" (DinatAttnForImageClassification), "model" (DinatAttnModel) or "backbone"
            (DinatAttnBackbone); what a target has no place for is left out: the head, or the norms of feature maps.

    Raises ValueError for names that are not of this architecture, and when the checkpoint is of another variant.
    """
    require_one_of("target", target, ("classification", "model", "backbone"))
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    check_variant(state, config)
    found: dict[str, Tensor] = {}
    gammas: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            found[name.replace("head.", "classifier.", 1)] = tensor
            continue
        new = name
        for pattern, replacement in _RULES:
            new = re.sub(pattern, replacement, new)
        if qkv := re.match(r"(.*)\.attn\.qkv\.(weight|bias)$", new):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{qkv[1]}.attention.self.{part}.{qkv[2]}"] = third.clone()
        elif gamma := re.match(r"(.*)\.(gamma[12])$", new):
            gammas.setdefault(gamma[1], {})[gamma[2]] = tensor
        elif _KNOWN.fullmatch(new):
            found[new] = tensor
        else:
            raise ValueError(f"{name!r} is no parameter of the official NAT or DiNAT code")
    for layer, pair in gammas.items():
        found[f"{layer}.layer_scale_parameters"] = torch.stack([pair["gamma1"], pair["gamma2"]])
    return _placed(found, config, target)


def _placed(found: dict[str, Tensor], config: DinatConfig, target: str) -> dict[str, Tensor]:
    """What the target has, under its prefix."""
    drop = {"classification": ("hidden_states_norms.",), "model": ("hidden_states_norms.", "classifier.")}
    left_out = drop.get(target, ("layernorm.", "classifier."))
    prefix = f"{config.model_type}." if target == "classification" else ""
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(left_out)}
    return {name if name.startswith("classifier.") else prefix + name: tensor for name, tensor in kept.items()}


def check_variant(state: dict[str, Tensor], config: DinatConfig) -> None:
    """Raise ValueError unless widths, depths, heads and kernel of an official state dict are the config's."""
    blocks = {tuple(map(int, m.groups())) for m in map(re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.").match, state) if m}
    if not blocks or "patch_embed.norm.weight" not in state:
        raise ValueError(
            "this is no state dict of the official NAT or DiNAT code (no levels.0.blocks.0 or patch_embed.norm); "
            f"names: {sorted(state)[:3]}"
        )
    stages = range(1 + max(stage for stage, _ in blocks))
    biases = [state[f"levels.{stage}.blocks.0.attn.rpb"].shape for stage in stages]
    has = {
        "embed_dim": len(state["patch_embed.norm.weight"]),
        "depths": [sum(stage == s for s, _ in blocks) for stage in stages],
        "num_heads": [shape[0] for shape in biases],
        "kernel_size": (biases[0][1] + 1) // 2,
    }
    wanted = {name: getattr(config, name) for name in has}
    wanted = {name: list(value) if isinstance(value, list | tuple) else value for name, value in wanted.items()}
    if has == wanted:
        return
    named = [name for name, options in VARIANTS.items() if all(options[key] == value for key, value in has.items())]
    raise ValueError(
        f"the checkpoint has {has}, the config asks for {wanted}; "
        + (f"it is variant {' or '.join(named)}: DinatConfig(**VARIANTS[{named[0]!r}])" if named else "no variant fits")
    )
