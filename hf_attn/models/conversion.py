"""`hf_attn.convert`: a model of the host becomes one of ours, with its weights and a few new ones."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn.checks import did_you_mean
from hf_attn.models import CONVERSIONS

# Keys of a config that say which class and file it came from, not what the model is.
_ORIGIN = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "hf_attn")


@dataclass(frozen=True)
class Conversion:
    """One system with new weights.

    Args:
        name: as given to `hf_attn.convert`.
        families: {model_type of the host: (module, name of our causal language model class)}.
        configure: `(base config, our config class, options) -> our config`; raises ValueError for bad options.
        rewrite: `(our config, name, weight of the base) -> weight`, for base weights that do not come over as they are;
            returns the very tensor where nothing changes.
    """

    name: str
    families: dict[str, tuple[str, str]]
    configure: Callable[[PreTrainedConfig, type[PreTrainedConfig], dict[str, Any]], PreTrainedConfig]
    rewrite: Callable[[Any, str, Tensor], Tensor] | None = None

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Our class for a config of the host; ValueError names the families there are."""
        if config.model_type not in self.families:
            raise ValueError(
                f"convert(..., {self.name!r}) has no class for model type {config.model_type!r}; it has for "
                f"{', '.join(sorted(self.families))}"
            )
        module, name = self.families[config.model_type]
        return getattr(importlib.import_module(module), name)


def get_conversion(name: str) -> Conversion:
    """The conversion called `name`; ValueError with the nearest names."""
    if name not in CONVERSIONS:
        known = ", ".join(sorted(CONVERSIONS))
        raise ValueError(
            f"unknown conversion {name!r}{did_you_mean(name, list(CONVERSIONS))}. Conversions: {known}. Mechanisms "
            "without weights of their own are put into a model by hf_attn.apply."
        )
    return importlib.import_module(CONVERSIONS[name]).CONVERSION


def convert(
    source: PreTrainedModel | str | os.PathLike, name: str, *, load: dict[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    """See `hf_attn.convert`."""
    conversion = get_conversion(name)
    if isinstance(source, str | os.PathLike):
        return _load(conversion, os.fspath(source), load or {}, options)
    if load is not None:
        raise ValueError("load= is for a repository or folder; this model is loaded already")
    _refuse(source, name)
    model_class = conversion.model_class(source.config)
    _check_class(source, conversion)
    config = conversion.configure(source.config, model_class.config_class, options)
    return around(source, model_class, config, conversion.rewrite)


def around(
    source: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    rewrite: Callable[[Any, str, Tensor], Tensor] | None = None,
) -> PreTrainedModel:
    """A model of `model_class` that holds the weights of `source`; see `convert`."""
    config.dtype = source.dtype
    with torch.device("meta"):
        model = model_class(config)
    share_weights(source, model, rewrite)
    model.train(source.training)
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in source.modules()):
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Turn on recomputation in the backward pass, under whichever name this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def carried_over(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of the host's config as keyword arguments for ours."""
    return {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}


def share_weights(
    source: nn.Module, target: nn.Module, rewrite: Callable[[Any, str, Tensor], Tensor] | None = None
) -> None:
    """Put the parameters and buffers of `source` into `target` (built on the meta device), by name.

    The very same tensors unless `rewrite` returns others: nothing is copied, tied weights stay tied. What `target`
    alone has is made beside its neighbours, on their device and in their dtype, and initialised as its model class
    does.
    """
    written: dict[int, nn.Parameter] = {}
    for name, module in source.named_modules():
        twin = target.get_submodule(name)
        for key, weight in module._parameters.items():
            if rewrite is not None and weight is not None:
                new = rewrite(target.config, f"{name}.{key}".lstrip("."), weight)
                if new is not weight:
                    weight = written.setdefault(id(weight), nn.Parameter(new.detach(), weight.requires_grad))
            twin._parameters[key] = weight
        twin._buffers.update(module._buffers)
    for name, module in target.named_modules():
        if not any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            continue
        parent = target.get_submodule(name.rpartition(".")[0])
        like = next(p for p in parent.parameters() if not p.is_meta and p.is_floating_point())
        module.to_empty(device=like.device, recurse=False)
        module.to(like.dtype)
        target._init_weights(module)


def _load(conversion: Conversion, repo: str, load: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    """Straight into our class, or around the host's model where weights do not come over as they are."""
    where = {
        key: load[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if key in load
    }
    base = AutoConfig.from_pretrained(repo, **where)
    model_class = conversion.model_class(base)
    config = conversion.configure(base, model_class.config_class, options)
    if conversion.rewrite is not None:
        return around(AutoModelForCausalLM.from_pretrained(repo, **load), model_class, config, conversion.rewrite)
    model = model_class.from_pretrained(repo, config=config, **load)
    model.config._name_or_path = model.name_or_path = ""
    return model


def _refuse(source: Any, name: str) -> None:
    """Raise TypeError or ValueError for models whose weights cannot be taken over as they are."""
    if hasattr(source, "get_base_model") or hasattr(source, "_orig_mod"):
        what = "merge the adapter first (model.merge_and_unload())" if hasattr(source, "get_base_model") else ""
        raise TypeError(
            f"hf_attn.convert takes a transformers PreTrainedModel, a repository or a folder, got "
            f"{type(source).__name__}: {what or 'pass the model itself, before torch.compile'}; adapters and compiled "
            "models are made from the converted model"
        )
    if not isinstance(source, PreTrainedModel):
        raise TypeError(
            f"hf_attn.convert takes a transformers PreTrainedModel, a repository or a folder, got "
            f"{type(source).__name__}"
        )
    if getattr(source, "_hf_peft_config_loaded", False):
        raise ValueError("the model holds PEFT adapters (add_adapter); delete or merge them before convert")
    if getattr(source, "is_quantized", False) or getattr(source, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantised, and its layers are not the ones the converted class has; call "
            f"model.dequantize() first, or hf_attn.convert(repo, {name!r}, load={{'quantization_config': ...}})"
        )
    if (
        any(tensor.is_meta for tensor in source.parameters())
        or len(set(getattr(source, "hf_device_map", {}).values())) > 1
    ):
        raise ValueError(
            "the model is offloaded or spread over devices, and its dispatch hooks cannot be carried over; use "
            f"hf_attn.convert(repo, {name!r}, load={{'device_map': ...}})"
        )


def _check_class(source: PreTrainedModel, conversion: Conversion) -> None:
    """The host's causal language model, not a base model, a classifier or a class of somebody else."""
    if not type(source).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"convert(..., {conversion.name!r}) takes a causal language model, got {type(source).__name__}; load it "
            "with AutoModelForCausalLM"
        )
