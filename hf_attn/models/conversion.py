"""`hf_attn.convert`: a model of the host becomes one of ours, with its weights and a few new ones."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn.checks import did_you_mean
from hf_attn.integrations.hub.names import hub_id
from hf_attn.integrations.transformers.loading import host_on_meta, renames_weights
from hf_attn.models import CONVERSIONS
from hf_attn.models.record import RECORD, patterns, write_record

# Keys of a config that say which class and file it came from, not what the model is.
_ORIGIN = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "hf_attn", RECORD)

Family = tuple[str, str] | tuple[str, str, str]
Prepared = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Conversion:
    """One system with new weights.

    Args:
        name: as given to `hf_attn.convert`.
        families: {model_type of the host: (module, name of our class)}, for diffusers {class name of the host: ...}. A
            list of such pairs where a model type has several kinds (a base model, a classifier, ...), the usual one
            first. The host's class is the one ours inherits from; a third entry names it where ours does not inherit.
        configure: `(base config, our config class, options) -> our config`; raises ValueError for bad options. For
            diffusers `(base config, our model class, options) -> arguments of our model class`.
        prepare: `(load, options) -> (options for configure, {name of a new parameter: value})`, for systems that first
            look at the base model: `load()` returns it, in eval mode. Without it new weights are initialised by class.
        rewrite: `(our config, name, weight of the base) -> weight`, for base weights that do not come over as they are;
            returns the very tensor where nothing changes.
    """

    name: str
    families: dict[str, Family | list[Family]]
    configure: Callable[[Any, type, dict[str, Any]], Any]
    prepare: Callable[[Callable[[], nn.Module], dict[str, Any]], Prepared] | None = None
    rewrite: Callable[[Any, str, Tensor], Tensor] | None = None

    def model_class(self, config: Any, architecture: str | type | None = None) -> type[nn.Module]:
        """Our class for a config of the host; see `kind`."""
        return self.kind(config, architecture)[0]

    def kind(self, config: Any, architecture: str | type | None = None) -> tuple[type[nn.Module], str]:
        """Our class for a config of the host, and the name of the host's class.

        Args:
            architecture: class of the host's model, or its name; None takes the family's first.

        Raises ValueError naming the families, or the classes of the family.
        """
        key = host_key(config)
        if key not in self.families:
            raise ValueError(
                f"convert(..., {self.name!r}) has no class for model type {key!r}; it has for "
                f"{', '.join(sorted(self.families))}"
            )
        found = self.families[key]
        kinds = [_resolve(family) for family in ([found] if isinstance(found, tuple) else found)]
        if architecture is None:
            return kinds[0]
        names = [architecture] if isinstance(architecture, str) else [c.__name__ for c in architecture.__mro__]
        for name in names:
            for model_class, host in kinds:
                if host == name:
                    return model_class, host
        takes = " or ".join(host for _, host in kinds)
        advice = ""
        if len(kinds) == 1 and takes.endswith("ForCausalLM"):
            takes, advice = f"a causal language model ({takes})", "; load it with AutoModelForCausalLM"
        raise ValueError(f"convert(..., {self.name!r}) takes {takes}, got {names[0]}{advice}")


def _resolve(family: Family) -> tuple[type[nn.Module], str]:
    """Our class, and the name of the host's class it stands for."""
    module, name, *host = family
    model_class = getattr(importlib.import_module(module), name)
    if host:
        return model_class, host[0]
    hosts = (c.__name__ for c in model_class.__mro__ if c.__module__.partition(".")[0] in ("transformers", "diffusers"))
    return model_class, next(hosts)


def config_of(source: nn.Module) -> Any:
    """Config of a loaded model of the host; in diffusers with the name of its class, as in the saved file."""
    return {**source.config, "_class_name": type(source).__name__} if _is_diffusers(source) else source.config


def host_key(config: Any) -> str:
    """What a family table calls the model of a config: its model type, or in diffusers the name of its class."""
    return config["_class_name"] if isinstance(config, Mapping) else config.model_type


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
    source: nn.Module | str | os.PathLike, name: str, *, load: dict[str, Any] | None = None, **options: Any
) -> nn.Module:
    """See `hf_attn.convert`."""
    from hf_attn.models import adapters

    adapters.install()
    conversion = get_conversion(name)
    if isinstance(source, str | os.PathLike):
        return _load(conversion, os.fspath(source), load or {}, options)
    if load is not None:
        raise ValueError("load= is for a repository or folder; this model is loaded already")
    _refuse(source, name)
    base = config_of(source)
    model_class = conversion.model_class(base, type(source))
    given = dict(options)
    weights: dict[str, Tensor] = {}
    if conversion.prepare is not None:
        training = source.training
        options, weights = conversion.prepare(source.eval, options)
        source.train(training)
    config = new_config(conversion, base, model_class, options, given, getattr(source, "name_or_path", None))
    return around(source, model_class, config, weights, conversion.rewrite)


def new_config(
    conversion: Conversion,
    base: Any,
    model_class: type[nn.Module],
    options: dict[str, Any],
    given: dict[str, Any],
    base_model: str | None,
) -> Any:
    """Config of the converted model, with a record of where it came from; arguments of the class in diffusers.

    Args:
        options: for `configure`; `given` are those of the user, before `prepare`.
        base_model: where the base came from; kept when it is a Hub id.
    """
    in_diffusers = isinstance(base, Mapping)
    config = conversion.configure(base, model_class if in_diffusers else model_class.config_class, options)
    before = dict(base) if in_diffusers else base.to_dict()
    write_record(config, conversion.name, host_key(base), before, given, hub_id(base_model))
    return config


def around(
    source: nn.Module,
    model_class: type[nn.Module],
    config: Any,
    weights: dict[str, Tensor] | None = None,
    rewrite: Callable[[Any, str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """A model of `model_class` that holds the weights of `source`; see `convert`."""
    record = config.pop(RECORD) if isinstance(config, dict) else None
    if record is None:
        config.dtype = source.dtype
    with torch.device("meta"):
        model = model_class(config) if record is None else model_class(**config)
    new = patterns(model.state_dict().keys() - source.state_dict().keys())
    if record is None:
        getattr(model.config, RECORD)["new_weights"] = new
    else:
        model.register_to_config(**{RECORD: {**record, "new_weights": new}})
    share_weights(source, model, weights, rewrite)
    model.train(source.training)
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in source.modules()):
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on recomputation in the backward pass, under whichever name the host has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def carried_over(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of the host's config as keyword arguments for ours."""
    return {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}


def share_weights(
    source: nn.Module,
    target: nn.Module,
    weights: dict[str, Tensor] | None = None,
    rewrite: Callable[[Any, str, Tensor], Tensor] | None = None,
) -> None:
    """Put the parameters and buffers of `source` into `target` (built on the meta device), by name.

    The very same tensors unless `rewrite` returns others: nothing is copied, tied weights stay tied. What `target`
    alone has is made beside its neighbours, on their device and in their dtype, and initialised as its model class
    does; `weights` are values for such parameters. Raises ValueError when `target` has no place for a weight.
    """
    written: dict[int, nn.Parameter] = {}
    if rewrite is not None:
        for name, weight in source.named_parameters(remove_duplicate=False):
            new = rewrite(target.config, name, weight)
            if new is not weight:
                # Under all of its names: a tied weight is rewritten once and stays tied.
                written[id(weight)] = nn.Parameter(new.detach(), weight.requires_grad)
    for name, module in source.named_modules():
        try:
            twin = target.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{type(source).__name__} has a module {name!r} that {type(target).__name__} has not: its weights "
                "would be lost; convert the host's own class"
            ) from None
        twin._parameters.update({key: written.get(id(weight), weight) for key, weight in module._parameters.items()})
        twin._buffers.update(module._buffers)
    for name, module in target.named_modules():
        if not any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            continue
        parent = target.get_submodule(name.rpartition(".")[0])
        around = [
            parent,
            *(target.get_submodule(name.rsplit(".", depth)[0]) for depth in range(2, name.count(".") + 1)),
        ]
        like = next(
            p for near in [*around, target] for p in near.parameters() if not p.is_meta and p.is_floating_point()
        )
        materialise(target, module, like.device, like.dtype)
    set_weights(target, weights or {})


def materialise(model: nn.Module, module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a module on the meta device memory, and initialise it as the class of `model` does."""
    module.to_empty(device=device, recurse=False)
    module.to(dtype)
    initialise = getattr(model, "_init_weights", None)
    initialise(module) if initialise else module.reset_parameters()


@torch.no_grad()
def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy values into parameters by name; raises ValueError for a name or a shape the model has not."""
    for name, value in weights.items():
        module, _, key = name.rpartition(".")
        try:
            weight = getattr(model.get_submodule(module), key)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no parameter {name!r}") from None
        if weight.shape != value.shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}, got values of shape {list(value.shape)}")
        weight.copy_(value)


def _load(conversion: Conversion, repo: str, load: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Straight into our class where the checkpoint has the names of its weights, around the host's model elsewhere."""
    where = {
        key: load[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if key in load
    }
    base = base_config(repo, **where)
    names = [base["_class_name"]] if isinstance(base, Mapping) else base.architectures or [None]
    model_class, host = conversion.kind(base, names[0])
    given = dict(options)
    weights: dict[str, Tensor] = {}
    if conversion.prepare is not None:
        options, weights = conversion.prepare(lambda: load_host(repo, host, load), options)
    config = new_config(conversion, base, model_class, options, given, repo)
    return load_as(repo, base, host, model_class, config, weights, conversion.rewrite, load)


def load_as(
    repo: str,
    base: Any,
    host: str,
    model_class: type[nn.Module],
    config: Any,
    weights: dict[str, Tensor],
    rewrite: Callable[[Any, str, Tensor], Tensor] | None,
    load: dict[str, Any],
) -> nn.Module:
    """A checkpoint of the host's class `host` as a model of ours; arguments as in `around`, `load` as in `convert`.

    Raises ValueError for a checkpoint that lacks weights.
    """
    empty = None if isinstance(base, Mapping) else host_on_meta(host, base)
    if empty is None or rewrite is not None or renames_weights(empty):
        source = load_host(repo, host, load)
        _refuse(source, getattr(config, RECORD)["name"] if empty is not None else config[RECORD]["name"])
        return around(source, model_class, config, weights, rewrite)
    model, report = model_class.from_pretrained(repo, config=config, output_loading_info=True, **load)
    lost = sorted(set(report["missing_keys"]) & empty.state_dict().keys())
    if lost:
        raise ValueError(
            f"{repo} lacks {len(lost)} weights of a {host} ({lost[0]}, ...); they would be random. Is the checkpoint "
            "complete, and of this architecture?"
        )
    getattr(model.config, RECORD)["new_weights"] = patterns(model.state_dict().keys() - empty.state_dict().keys())
    set_weights(model, weights)
    model.config._name_or_path = model.name_or_path = ""
    return model


def base_config(repo: str, **where: Any) -> Any:
    """Config of a checkpoint of transformers, or of a model of diffusers (a dict with `_class_name`)."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(repo, **where)
    except OSError as error:
        raise OSError(
            f"{error} (hf_attn.convert takes a model of transformers, or one model of diffusers: for a part "
            "of a pipeline pass load={'subfolder': 'transformer'})"
        ) from error
    return values if "_class_name" in values else AutoConfig.from_pretrained(repo, **where)


def load_host(repo: str, host: str, load: dict[str, Any]) -> nn.Module:
    """The host's own model, an object of its class `host`, in eval mode."""
    import transformers

    if hasattr(transformers, host):
        return getattr(transformers, host).from_pretrained(repo, **load)
    import diffusers

    return (
        getattr(diffusers, host)
        .from_pretrained(repo, **{"torch_dtype" if key == "dtype" else key: value for key, value in load.items()})
        .eval()
    )


def _refuse(source: Any, name: str) -> None:
    """Raise TypeError or ValueError for models whose weights cannot be taken over as they are."""
    if hasattr(source, "get_base_model") or hasattr(source, "_orig_mod"):
        what = "merge the adapter first (model.merge_and_unload())" if hasattr(source, "get_base_model") else ""
        raise TypeError(
            f"hf_attn.convert takes a transformers PreTrainedModel, a repository or a folder, got "
            f"{type(source).__name__}: {what or 'pass the model itself, before torch.compile'}; adapters and compiled "
            "models are made from the converted model"
        )
    if not isinstance(source, PreTrainedModel) and not _is_diffusers(source):
        raise TypeError(
            f"hf_attn.convert takes a transformers PreTrainedModel, a model of diffusers, a repository or a folder, "
            f"got {type(source).__name__}"
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


def _is_diffusers(source: Any) -> bool:
    """A ModelMixin, told without importing diffusers for other objects."""
    return any(c.__module__.startswith("diffusers.") and c.__name__ == "ModelMixin" for c in type(source).__mro__)
