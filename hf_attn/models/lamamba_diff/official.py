"""Weights of the official repository (yunxiangfu2001/LaMamba-Diff) under our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from hf_attn.models.lamamba_diff.modeling_lamamba_diff import LaMambaDiffTransformer2DModel

# Official name -> ours, tried in this order; the first rules are those of the net, the others of a block.
_NAMES = (
    (r"^patch_embed\.", "patch_"),
    (r"^t_embedder\.mlp\.0\.", "time_fc1."),
    (r"^t_embedder\.mlp\.2\.", "time_fc2."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"^layers\.(\d+)\.blocks\.", r"encoder.\1."),
    (r"^layers\.(\d+)\.downsample\.", r"down.\1."),
    (r"^mid_layer\.blocks\.", "mid."),
    (r"^layers_up\.(\d+)\.blocks\.", r"decoder.\1."),
    (r"^layers_up\.2\.upsample\.", "up.0."),
    (r"^layers_up\.3\.upsample\.", "up.1."),
    (r"^final_condition_projection\.", "head.cond_proj."),
    (r"^final_up\.", "head."),
    (r"^final_adaLN_modulation\.1\.", "head.modulation."),
    (r"^final_linear\.", "head.proj."),
    (r"\.condition_projection\.", ".cond_proj."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.norm\.(weight|bias)$", r".norm_ssm.\1"),
    (r"\.norm_swin\.", ".norm_attn."),
    (r"\.norm2\.", ".norm_mlp."),
    (r"\.op\.conv2d\.", ".ssm.conv."),
    (r"\.op\.x_proj_weight$", ".ssm.x_proj"),
    (r"\.op\.dt_projs_weight$", ".ssm.dt_proj"),
    (r"\.op\.dt_projs_bias$", ".ssm.dt_bias"),
    (r"\.op\.A_logs$", ".ssm.A_log"),
    (r"\.op\.Ds$", ".ssm.D"),
    (r"\.op\.out_norm\.", ".ssm.norm."),
    (r"\.op\.", ".ssm."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_bias"),
)
# Tables that are computed here.
_BUFFERS = ("relative_position_index", "attn_mask")
_NORMS_OF_THE_NET = re.compile(r"^(down\.|up\.|head\.|patch_)")


def load_official(weights: Mapping[str, Tensor]) -> LaMambaDiffTransformer2DModel:
    """A model with the weights of an official checkpoint; its config is read from their shapes.

    Args:
        weights: the state dict of the network (its EMA, usually), already loaded; a prefix "module." is dropped.

    Raises ValueError for weights that are not those of such a network, naming what is missing or unknown.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.")
        if name.rsplit(".", 1)[-1] not in _BUFFERS:
            ours[_our_name(name)] = tensor
    needed = ("pos_embed", "head.proj.weight", "label_embed.weight", "encoder.0.0.ssm.A_log")
    absent = [name for name in needed if name not in ours]
    if absent:
        raise ValueError(f"these are no LaMamba-Diff weights: nothing there for {', '.join(absent)}")
    for name, tensor in ours.items():
        if name.endswith((".ssm.A_log", ".ssm.D")):
            ours[name] = tensor.unflatten(0, (4, -1))
    model = LaMambaDiffTransformer2DModel(**_config(ours))
    missing, unknown = model.load_state_dict(ours, strict=False)
    if missing or unknown:
        raise ValueError(f"weights do not fit the network: missing {missing}, unknown {unknown}")
    return model.eval()


def _our_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        if pattern.startswith(r"\.norm\.") and _NORMS_OF_THE_NET.match(name):
            continue
        name = re.sub(pattern, replacement, name)
    return name


def _config(weights: dict[str, Tensor]) -> dict:
    """The constructor's arguments, from shapes."""
    _, side, _, base = weights["pos_embed"].shape
    first = "encoder.0.0."
    tables = [t.shape[0] for name, t in weights.items() if name.endswith("rel_bias")]
    inner, _, kernel, _ = weights[first + "ssm.conv.weight"].shape

    def depth(stage: str) -> int:
        found = {name[len(stage) + 1 :].split(".")[0] for name in weights if name.startswith(stage + ".")}
        return len(found)

    return {
        "sample_size": side,
        "in_channels": weights["patch_proj.weight"].shape[1],
        "out_channels": weights["head.proj.weight"].shape[0],
        "num_classes": weights["label_embed.weight"].shape[0] - 1,
        "base_channels": base,
        "depths": [depth(f"encoder.{stage}") for stage in range(4)],
        "bottleneck_depth": depth("mid"),
        "num_heads": weights[first + "attn.rel_bias"].shape[1],
        "window_size": (math.isqrt(max(tables)) + 1) // 2,
        "ssm_state_size": weights[first + "ssm.A_log"].shape[2],
        "ssm_ratio": inner / base,
        "ssm_conv": kernel,
        "mlp_ratio": weights[first + "mlp.fc1.weight"].shape[0] / base,
    }
