"""Conversion "uoe": a dense model cut into experts, with gates fitted in closed form, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn.checks import did_you_mean
from hf_attn.models.conversion import Conversion, carried_over
from hf_attn.models.record import RECORD

_MODULE = "hf_attn.models.uoe.modeling_uoe"
_OPTIONS = (
    "attn_experts",
    "attn_top_k",
    "mlp_experts",
    "mlp_top_k",
    "layers",
    "patch_size",
    "gate_mode",
    "score_eps",
    "score_scale",
    "always_select_first",
    "kv_shared",
    "gate_bias",
    "balance",
)
# Ridge added to the normal equations of a gate, in units of their mean diagonal.
_RIDGE = 1e-2


def configure(
    base: PreTrainedConfig, config_class: type[PreTrainedConfig], options: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model; an option `x` is the field `uoe_x`.

    Raises ValueError for unknown options.
    """
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(
                f"unknown option {name!r}{did_you_mean(name, list(_OPTIONS))} of conversion 'uoe'; options: "
                f"{', '.join(_OPTIONS)}, calibration"
            )
    config = config_class(**carried_over(base), **{f"uoe_{name}": value for name, value in options.items()})
    config.check_experts()
    return config


def prepare(load: Callable[[], nn.Module], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Without `calibration` gates are drawn at random; with it they are fitted to what each expert contributes.

    `calibration`: token ids int64 `[B, N]` of ordinary text, about 2000 tokens.

    Raises ValueError for a `calibration` of another kind.
    """
    options = dict(options)
    ids = options.pop("calibration", None)
    if ids is None:
        return options, {}
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError("calibration must be token ids [B, N] (int64), or None")
    source = load()
    model_class = CONVERSION.model_class(source.config, type(source))
    config = configure(source.config, model_class.config_class, options)
    return options, fit_gates(source, config, ids)


@torch.no_grad()
def fit_gates(model: PreTrainedModel, config: PreTrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """Gate weights by ridge regression from a block's input to the norm of every expert's contribution.

    Args:
        model: the dense base model.
        config: of the converted model.
        ids: int64 `[B, N]`, text.

    Returns {name of the parameter: value}. Targets are scaled to unit spread over all experts of a block.
    """
    found: dict[str, Tensor] = {}
    layers = range(config.num_hidden_layers) if config.uoe_layers is None else config.uoe_layers
    with ExitStack() as stack:
        blocks = []
        for index in layers:
            layer, prefix = model.model.layers[index], f"model.layers.{index}"
            if config.uoe_attn_top_k is not None:
                into = layer.self_attn.o_proj, config.attention_experts()
                blocks.append((f"{prefix}.self_attn", layer.self_attn, *into))
            if config.uoe_mlp_top_k is not None:
                blocks.append((f"{prefix}.mlp", layer.mlp, layer.mlp.down_proj, config.uoe_mlp_experts))
        seen = [stack.enter_context(_record(block, last)) for _, block, last, _ in blocks]
        model(input_ids=ids.to(model.device), use_cache=False)
    for (name, _, last, count), (inputs, inner) in zip(blocks, seen, strict=True):
        features, parts = inputs["x"].flatten(0, 1).float(), inner["x"].flatten(0, 1).float()
        slices = zip(parts.chunk(count, -1), last.weight.float().chunk(count, 1), strict=True)
        norms = torch.stack([(part @ weight.T).norm(dim=-1) for part, weight in slices], -1)
        weight, bias = _ridge(features, norms / norms.std().clamp(min=1e-12), config.uoe_gate_bias)
        found[f"{name}.uoe_gate.weight"] = weight
        if config.uoe_gate_bias:
            found[f"{name}.uoe_gate.bias"] = bias
    return found


@contextmanager
def _record(block: nn.Module, last: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs of a block and of its last projection, filled by the next forward."""
    outer: dict[str, Tensor] = {}
    inner: dict[str, Tensor] = {}

    def keep(into: dict[str, Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> None:
            into["x"] = arguments[0] if arguments else kwargs["hidden_states"]

        return hook

    handles = [
        module.register_forward_pre_hook(keep(into), with_kwargs=True)
        for module, into in ((block, outer), (last, inner))
    ]
    try:
        yield outer, inner
    finally:
        for handle in handles:
            handle.remove()


def _ridge(features: Tensor, targets: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Weights `[n, d]` and biases `[n]` of the regularised least squares."""
    x, y = features.double(), targets.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    x, y = x - mean_x, y - mean_y
    normal = x.T @ x
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(normal, x.T @ y).T
    return weight.float(), (mean_y - weight @ mean_x).float()


@torch.no_grad()
def order_neurons(model: PreTrainedModel, ids: Tensor, num_experts: int, *, layers: list[int] | None = None) -> None:
    """Re-order the inner features of MLPs in place, so that features that fire together fall to one expert.

    The function of the model stays the same up to rounding: rows of gate_proj and up_proj and columns of down_proj
    move alike. Balanced k-means over the features' activations on the text.

    Args:
        model: a dense model of a family of "uoe", before `hf_attn.convert`.
        ids: int64 `[B, N]`, about 2000 tokens of ordinary text.
        num_experts: as `mlp_experts` of the conversion.
        layers: indices; None for all.

    Raises ValueError when num_experts does not divide intermediate_size.
    """
    chosen = range(model.config.num_hidden_layers) if layers is None else layers
    width = model.config.intermediate_size
    if width % num_experts:
        raise ValueError(f"num_experts must divide intermediate_size={width}, got {num_experts}")
    with ExitStack() as stack:
        mlps = [model.model.layers[index].mlp for index in chosen]
        seen = [stack.enter_context(_record(mlp, mlp.down_proj)) for mlp in mlps]
        model(input_ids=ids.to(model.device), use_cache=False)
    for mlp, (_, inner) in zip(mlps, seen, strict=True):
        order = balanced_clusters(inner["x"].flatten(0, 1).float().abs().T, num_experts)
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.copy_(projection.weight[order])
            if projection.bias is not None:
                projection.bias.copy_(projection.bias[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


def balanced_clusters(points: Tensor, count: int, rounds: int = 10) -> Tensor:
    """Indices of `points` `[P, F]` such that each of `count` equal runs is one cluster; deterministic.

    Points are compared by direction. In every round the pair of point and centre with the highest similarity is
    placed first, as long as the cluster has room.
    """
    points = torch.nn.functional.normalize(points - points.mean(1, keepdim=True), dim=1)
    size = points.shape[0] // count
    # Start with points far from each other: each is the one least like those before.
    starts = [int(points.square().sum(1).argmax())]
    for _ in range(count - 1):
        starts.append(int((points @ points[starts].T).amax(1).argmin()))
    centres = points[starts]
    for _ in range(rounds):
        similarity = points @ centres.T
        members: list[list[int]] = [[] for _ in range(count)]
        placed = torch.zeros(points.shape[0], dtype=torch.bool)
        for flat in similarity.flatten().argsort(descending=True, stable=True).tolist():
            point, cluster = divmod(flat, count)
            if not placed[point] and len(members[cluster]) < size:
                members[cluster].append(point)
                placed[point] = True
        centres = torch.nn.functional.normalize(torch.stack([points[m].mean(0) for m in members]), dim=1)
    return torch.tensor([point for group in members for point in sorted(group)], device=points.device)


def merge_to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model of the host with the weights of a union of experts; the gates are dropped.

    The exact inverse of the conversion when nothing was trained: an expert is a slice of the dense weights. Both models
    share them. Raises TypeError for other models.
    """
    from hf_attn.models.uoe import modeling_uoe

    if not isinstance(model, modeling_uoe.UoeForCausalLM):
        raise TypeError(f"merge_to_dense takes a model converted with 'uoe', got {type(model).__name__}")
    host = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    host = getattr(transformers, host.__name__)
    fields = {key: value for key, value in carried_over(model.config).items() if not key.startswith("uoe_")}
    config = host.config_class(**{key: value for key, value in fields.items() if key != RECORD})
    config.dtype = model.dtype
    with torch.device("meta"):
        dense = host(config)
    for name, module in dense.named_modules():
        twin = model.get_submodule(name)
        module._parameters.update({key: twin._parameters[key] for key in module._parameters})
        module._buffers.update({key: twin._buffers[key] for key in module._buffers})
    if model.generation_config is not None:
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)


CONVERSION = Conversion(
    name="uoe",
    families={
        host: (_MODULE, f"Uoe{name}ForCausalLM")
        for host, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("mistral", "Mistral"))
    },
    configure=configure,
    prepare=prepare,
)
