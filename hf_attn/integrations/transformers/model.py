"""One verb for a loaded transformers model: put a mechanism into it, read its statistics, take it out again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn.integrations.transformers import registration, repairs
from hf_attn.integrations.transformers import stats as counters
from hf_attn.integrations.transformers.config import (
    PREFIX,
    mechanism_of,
    mechanism_options,
    target_config,
    target_names,
)
from hf_attn.mechanism import get_mechanism, parse_config


@dataclass(frozen=True)
class Previous:
    """What `apply` changed: implementations by sub-config name ("" is the model's config), and `config.hf_attn`."""

    implementations: dict[str, str]
    hf_attn: dict[str, Any] | None


# Options of a config that mean an argument no mechanism can honour; the attention function refuses that one as well.
_REFUSED_OPTIONS = {
    "attn_logit_softcapping": "soft-capping of the scores (softcap)",
    "relative_attention_num_buckets": "an additive position bias (position_bias)",
}
_PREVIOUS: WeakKeyDictionary[PreTrainedModel, Previous] = WeakKeyDictionary()


def apply(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    """Let `model` use mechanism `name` from its next call on; returns the model.

    Args:
        model: a transformers model: a decoder language model, an encoder or vision model (mechanisms that support
            bidirectional layers), a multimodal model (its text model, or what `targets` names), or an encoder-decoder
            (self-attention; cross-attention stays dense and is counted).
        name: a mechanism's name, as `hf_attn.list_mechanisms()` shows them, or a repair of a model whose attention code
            is its own: "lightning" for MiniMax. A repair is not saved with the model.
        options: the mechanism's options; `layers={index or slice: options or None}` for single layers (None = dense),
            `targets=[...]` for the sub-configs of a multimodal model (default: its text model), `required=True` to make
            the saved checkpoint refuse to load without hf-attn.

    The options are kept in `model.config.hf_attn` and saved with the model. Raises ValueError, and changes nothing, for
    unknown names, options, layers or targets, and for models that would ignore the mechanism or that it cannot serve
    (soft-capping, attention sinks, position biases, bidirectional layers of a causal mechanism in an encoder-decoder).
    """
    if repairs.known(name, model):
        repairs.install(name, model, options)
        return model
    value = {"mechanism": name, **options}
    mechanism, config = parse_config(mechanism_options(value, name) | {"mechanism": name})
    targets = target_names(model.config, value)
    refuse_model(model, mechanism.name)
    for target in targets:
        found = target_config(model.config, target)
        refuse_config(found, mechanism.name)
        if (count := getattr(found, "num_hidden_layers", None)) is not None:
            config.check_layer_count(count)
        if (count := getattr(found, "num_key_value_heads", None)) is not None:
            config.check_head_count(count)
    registration.register(mechanism.name)
    before = Previous(implementations(model.config), copy.deepcopy(model.config.hf_attn))
    try:
        model.config.hf_attn = value
        model.set_attn_implementation(dict.fromkeys(targets, PREFIX + mechanism.name))
    except Exception:
        _restore(model, before)
        raise
    _PREVIOUS.setdefault(model, before)
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `apply`: implementation and `config.hf_attn` as they were before the first of several applies.

    A model that was loaded with a mechanism goes to the implementation transformers would choose by itself, without
    `config.hf_attn`. Repairs are taken out too. Does nothing to a model without a mechanism. Returns the model.
    """
    repairs.undo(model)
    before = _PREVIOUS.pop(model, None)
    if before is None:
        ours = {name: impl for name, impl in implementations(model.config).items() if mechanism_of(impl)}
        if not ours and model.config.hf_attn is None:
            return model
        before = Previous(dict.fromkeys(ours, model.get_correct_attn_implementation(None)), None)
    _restore(model, before)
    counters.reset_model_stats(model)
    return model


def stats(model: PreTrainedModel) -> dict[str, Any]:
    """What the attention layers did since loading or `reset_stats`, JSON-ready.

    Returns
        mechanism, options: what is set now (mechanism None when none is).
        repairs: names of the repairs in the model.
        layers: {layer number (module name where numbers repeat): calls, sparse_calls, dense_calls, dense_reasons,
            paths, computed_pairs, visible_pairs, density, counts, last_q_len, last_k_len}; only layers that were
            called through hf_attn. `counts` holds the mechanism's own numbers (lserve: pages read, ...).
        totals: the same summed over layers.

    `density` counts the calls whose mechanism reported pairs, not the dense ones. Calls inside graphs of torch.compile
    or torch.export are not counted; layers recomputed by gradient checkpointing count twice.
    """
    name, options = active(model)
    layers = counters.model_stats(model)
    return {
        "mechanism": name,
        "options": options,
        "repairs": repairs.installed(model),
        "layers": layers,
        "totals": counters.totals(layers),
    }


def reset_stats(model: PreTrainedModel) -> None:
    """Set all counters of `model` to zero."""
    counters.reset_model_stats(model)


def active(model: PreTrainedModel) -> tuple[str | None, dict[str, Any]]:
    """Name and full options (defaults included) of the mechanism the model's implementation names, or (None, {})."""
    for target, implementation in implementations(model.config).items():
        name = mechanism_of(implementation)
        if name is not None:
            bound = registration.bound_options(implementation)
            options = mechanism_options(target_config(model.config, target).hf_attn, name) if bound is None else bound
            return name, parse_config({**options, "mechanism": name})[1].to_dict()
    return None, {}


def refuse_model(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError for model classes that would ignore an attention implementation, or need what `name` lacks."""
    able = get_mechanism(name).capabilities
    if able.latent_grid:
        raise ValueError(
            f"{PREFIX}{name} works on the latent grid of diffusion transformers, which {type(model).__name__} does not "
            "have; apply it to a diffusers pipeline, or use 'moba' or 'streaming' here (hf_attn.list_mechanisms())"
        )
    if getattr(model.config, "is_encoder_decoder", False) and not able.bidirectional:
        raise ValueError(
            f"{PREFIX}{name} needs causal attention, but the encoder of {type(model).__name__} is not causal; use "
            "'moba', or a decoder-only language model"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise ValueError(
                f"{type(module).__name__} has attention code of its own and ignores attn_implementation, so "
                f"{PREFIX}{name} would never be called; use a model whose attention goes through transformers' "
                "AttentionInterface (Llama, Qwen, Mistral, Gemma 3, ...)"
            )
        if isinstance(getattr(module, "sinks", None), Tensor):
            raise ValueError(
                f"{PREFIX}{name} does not support attention sinks (s_aux), which {type(module).__name__} has; use "
                "attn_implementation='eager' for this model"
            )


def refuse_config(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError for options of a model config that no mechanism can honour."""
    for key, what in _REFUSED_OPTIONS.items():
        value = getattr(config, key, None)
        if value is not None:
            raise ValueError(
                f"{PREFIX}{name} does not support {what}, got {key}={value}; use attn_implementation='eager' for this "
                "model"
            )


def implementations(config: PreTrainedConfig) -> dict[str, str]:
    """The attention implementation of a config ("") and of each of its sub-configs."""
    configs = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    return {name: c._attn_implementation for name, c in configs.items() if isinstance(c, PreTrainedConfig)}


def _restore(model: PreTrainedModel, before: Previous) -> None:
    model.set_attn_implementation(before.implementations)
    model.config.hf_attn = before.hf_attn
