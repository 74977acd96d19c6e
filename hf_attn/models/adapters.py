"""PEFT adapters of converted models, and of models with a mechanism.

`hf_attn.json` beside them says which base they need, and loading checks it.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_attn.integrations.hub.names import hub_id
from hf_attn.integrations.peft import hooks
from hf_attn.integrations.peft.wrapping import base_weight
from hf_attn.integrations.transformers.config import mechanism_options
from hf_attn.integrations.transformers.model import apply
from hf_attn.models.cards import is_generated, write_model_card
from hf_attn.models.conversion import (
    around,
    base_config,
    carried_over,
    config_of,
    get_conversion,
    host_key,
    load_as,
    load_host,
    set_weights,
)
from hf_attn.models.fingerprint import fingerprint, same_values
from hf_attn.models.pushing import push_card
from hf_attn.models.record import RECORD, is_new, read_record

FILE = "hf_attn.json"
# New weights that the adapter does not train, so that base and adapter together are the whole model.
WEIGHTS = "hf_attn_weights.safetensors"
_FORMAT = 1


def install() -> None:
    """From now on PEFT itself writes `hf_attn.json` when it saves, and refuses wrong bases when it loads adapters."""
    hooks.install(_after_save, _before_load, _before_push, _after_load)


def save_adapter(model: Any, folder: str | os.PathLike, **options: Any) -> None:
    """See `hf_attn.save_adapter`."""
    if not hasattr(model, "peft_config"):
        raise TypeError(f"hf_attn.save_adapter takes a PeftModel, got {type(model).__name__}")
    install()
    base = model.get_base_model()
    if read_record(base.config) is None and not _mechanism(base.config):
        raise ValueError(
            f"{type(base).__name__} is no converted model (its config has no {RECORD}) and uses no mechanism of "
            "hf-attn; save its adapter with model.save_pretrained"
        )
    model.save_pretrained(folder, **options)


def load_adapter(
    base: nn.Module | str | os.PathLike,
    adapter: str | os.PathLike,
    *,
    load: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """See `hf_attn.load_adapter`."""
    from peft import PeftModel

    install()
    if hasattr(base, "peft_config") or hasattr(base, "get_base_model"):
        raise TypeError("hf_attn.load_adapter takes the base, got a PeftModel; pass model.unload(), or the base anew")
    about = read_file(adapter, {key: options[key] for key in ("revision", "token", "subfolder") if key in options})
    model = (_with_mechanism if "mechanism" in about else _base_for)(about, base, load or {})
    weights = _fetch(adapter, WEIGHTS, options)
    if weights is not None:
        set_weights(model, load_file(weights))
    _check_values(about, model, _name(base))
    return PeftModel.from_pretrained(model, os.fspath(adapter), **options)


def describe(model: nn.Module, adapter: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Contents of `hf_attn.json` for a converted model, and its new weights that `adapter` does not hold.

    For other models the file has the mechanism and the base.
    """
    record = read_record(model.config)
    shapes = _shapes(model)
    if record is None:
        config = model.config
        where = {"type": host_key(config), "name": hub_id(getattr(model, "name_or_path", None))}
        return {
            "format": _FORMAT,
            "mechanism": _mechanism(config),
            "base": {**where, "fingerprint": _base_fingerprint(model, None, shapes)},
        }, {}
    new = [name for name in shapes if is_new(record, name)]
    found = {name: base_weight(model, name, adapter) for name in new}
    return {
        "format": _FORMAT,
        "conversion": {
            "name": record["name"],
            "options": record["options"],
            "fields": record["fields"],
            "new_weights": record["new_weights"],
        },
        "card": record.get("card", {}),
        "base": {
            "type": record["base_type"],
            "name": record["base_model"],
            "length": getattr(model.config, "max_position_embeddings", None),
            "fingerprint": _base_fingerprint(model, record, shapes),
        },
        "trained": sorted({name.rpartition(".")[0] for name, (_, saved) in found.items() if saved}),
    }, {name: weight.detach().contiguous() for name, (weight, saved) in found.items() if not saved}


def read_file(adapter: str | os.PathLike, where: dict[str, Any]) -> dict[str, Any]:
    """`hf_attn.json` of an adapter's folder or repository; ValueError when it is missing or of a later format."""
    file = _fetch(adapter, FILE, where)
    if file is None:
        raise ValueError(
            f"{adapter} has no {FILE}: it is no adapter of a converted model, or was saved without hf-attn. Load it "
            "with PEFT on the base it was trained on, or save it again with hf_attn.save_adapter"
        )
    about = json.loads(Path(file).read_text())
    if about.get("format") != _FORMAT:
        raise ValueError(f"{file} has format {about.get('format')!r}, this version of hf-attn reads {_FORMAT}")
    return about


def _fetch(adapter: str | os.PathLike, name: str, where: Mapping[str, Any]) -> Path | None:
    """A file of a local folder or of the Hub, None where it does not exist."""
    folder = Path(adapter)
    if folder.is_dir():
        file = folder / (where.get("subfolder") or "") / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {key: where[key] for key in ("revision", "token", "subfolder") if key in where}
    try:
        return Path(hf_hub_download(os.fspath(adapter), name, **where))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _base_for(about: dict[str, Any], base: nn.Module | str | os.PathLike, load: dict[str, Any]) -> nn.Module:
    """The converted base, made from a plain one where that is given; raises ValueError for one that does not fit."""
    in_memory = isinstance(base, nn.Module)
    where = {key: load[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in load}
    config = config_of(base) if in_memory else base_config(os.fspath(base), **where)
    record = read_record(config)
    if record is not None:
        _check_record(about, record, _name(base))
        return base if in_memory else _load_converted(base, config, load)
    conversion = get_conversion(about["conversion"]["name"])
    if host_key(config) != about["base"]["type"]:
        raise ValueError(
            f"the adapter was trained on {_trained_on(about)}, which is a {about['base']['type']} model; {_name(base)} "
            f"is a {host_key(config)} model"
        )
    names = [type(base)] if in_memory else getattr(config, "architectures", None) or [config.get("_class_name")]
    model_class, host = conversion.kind(config, names[0])
    ours = _our_config(about, config, model_class)
    if in_memory:
        model = around(base, model_class, ours, rewrite=conversion.rewrite)
    else:
        model = load_as(os.fspath(base), config, host, model_class, ours, {}, conversion.rewrite, load)
    return model


def _with_mechanism(about: dict[str, Any], base: nn.Module | str | os.PathLike, load: dict[str, Any]) -> nn.Module:
    """The base with the adapter's mechanism; raises ValueError for one of another type or with another mechanism."""
    wanted = about["mechanism"]
    if isinstance(base, nn.Module):
        model: Any = base
    else:
        where = {key: load[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in load}
        config = base_config(os.fspath(base), **where)
        model = load_host(os.fspath(base), config.architectures[0], load)
    if host_key(config_of(model)) != about["base"]["type"]:
        raise ValueError(
            f"the adapter was trained on {_trained_on(about)}, which is a {about['base']['type']} model; {_name(base)} "
            f"is a {host_key(config_of(model))} model"
        )
    found = _mechanism(model.config)
    if found not in (None, wanted):
        raise ValueError(
            f"the adapter was trained with {wanted}, but {_name(base)} uses {found}; remove that first: "
            "hf_attn.remove(model)"
        )
    if found is None:
        apply(model, wanted["mechanism"], **mechanism_options(wanted, wanted["mechanism"]))
    return model


def _mechanism(config: Any) -> dict[str, Any] | None:
    """`config.hf_attn` of a model of transformers that runs it, None for others."""
    options = None if isinstance(config, Mapping) else getattr(config, "hf_attn", None)
    return options or None


def _our_config(about: dict[str, Any], base: Any, model_class: type[nn.Module]) -> Any:
    """The converted model's config, from the base's and the fields in `hf_attn.json`."""
    fields = about["conversion"]["fields"]
    record = {
        "name": about["conversion"]["name"],
        "options": about["conversion"]["options"],
        "base_type": about["base"]["type"],
        "base_model": about["base"]["name"],
        "fields": sorted(fields),
        "new_weights": [],
    }
    if isinstance(base, Mapping):
        return {**{key: value for key, value in base.items() if not key.startswith("_")}, **fields, RECORD: record}
    plain = {key: value for key, value in fields.items() if key != "hf_attn"}
    config = model_class.config_class(**{**carried_over(base), **plain})
    if fields.get("hf_attn"):
        config.hf_attn = fields["hf_attn"]
    setattr(config, RECORD, record)
    return config


def _load_converted(base: str | os.PathLike, config: Any, load: dict[str, Any]) -> nn.Module:
    from transformers.models.auto import modeling_auto

    architecture = (config.architectures or [None])[0]
    for name in ("AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModel"):
        found = getattr(modeling_auto, name)._model_mapping
        if type(config) in found and architecture in (None, found[type(config)].__name__):
            return getattr(modeling_auto, name).from_pretrained(base, **load)
    raise ValueError(f"{base} holds a {architecture}, which no Auto class loads; load it yourself and pass the model")


def _check_record(about: dict[str, Any], record: dict[str, Any], name: str) -> None:
    """Raise ValueError unless a converted base was converted as the adapter's was, naming both."""
    wanted = about["conversion"]
    if record["name"] != wanted["name"] or record["base_type"] != about["base"]["type"]:
        raise ValueError(
            f"the adapter belongs to a {about['base']['type']} model converted to {wanted['name']!r}; {name} is a "
            f"{record['base_type']} model converted to {record['name']!r}"
        )
    theirs, ours = wanted["fields"], record["fields"]
    other = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if other:
        apart = "; ".join(f"{key}: {theirs.get(key)} in the adapter, {ours.get(key)} here" for key in other)
        raise ValueError(
            f"the adapter was trained on a model converted with other options than {name}: {apart}. Pass the plain "
            "base, which is converted as the adapter needs it"
        )


def _check_values(about: dict[str, Any], model: nn.Module, name: str) -> None:
    """Raise ValueError unless the base's weights are those the adapter was trained on, naming both."""
    theirs, here = about["base"]["fingerprint"], _base_fingerprint(model, read_record(model.config), _shapes(model))
    if theirs["layout"] != here["layout"]:
        raise ValueError(
            f"the adapter was trained on {_trained_on(about)} with {theirs['parameters']:,} parameters; {name} has "
            f"{here['parameters']:,}, or other shapes: it is a model of another size"
        )
    same = same_values(theirs, here)
    if same is False:
        raise ValueError(
            f"the adapter was trained on {_trained_on(about)} with weights {theirs['values']}; {name} is of that shape "
            f"but has weights {here['values']}. Use the checkpoint the adapter was trained on"
        )
    if same is None:
        warnings.warn(
            f"weights of {name} ({here['dtype']}) cannot be compared with those the adapter was trained on "
            f"({theirs['dtype']}): quantised, or float16 against another format. Architecture, sizes and options agree",
            stacklevel=3,
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of all weights as the model has them before PEFT and quantisation."""
    config = model.config
    with torch.device("meta"):
        if isinstance(config, Mapping):
            plain = type(model).from_config(dict(config))
        else:
            config = copy.deepcopy(config)
            config.__dict__.pop("quantization_config", None)
            plain = type(model)(config)
    return {name: list(weight.shape) for name, weight in plain.named_parameters()}


def _base_fingerprint(model: nn.Module, record: dict[str, Any] | None, shapes: dict[str, list[int]]) -> dict[str, Any]:
    old = {name: shape for name, shape in shapes.items() if record is None or not is_new(record, name)}
    return fingerprint(old, lambda name: base_weight(model, name)[0])


def _name(base: Any) -> str:
    if not isinstance(base, nn.Module):
        return repr(os.fspath(base))
    return getattr(base, "name_or_path", "") or f"the {type(base).__name__} given"


def _trained_on(about: dict[str, Any]) -> str:
    return repr(about["base"]["name"]) if about["base"]["name"] else f"a {about['base']['type']} model"


def _after_save(model: Any, folder: Path, adapter: str) -> None:
    """Put `hf_attn.json` and the new weights that the adapter lacks beside an adapter of a converted model.

    Beside one of a model with a mechanism goes `hf_attn.json` alone.
    """
    base = model.get_base_model()
    converted = read_record(base.config) is not None
    if not folder.is_dir() or not (converted or _mechanism(base.config)):
        return
    about, weights = describe(base, adapter)
    if weights:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n")
    card = folder / "README.md"
    if converted and (not card.is_file() or is_generated(card.read_text(encoding="utf-8"))):
        write_model_card(folder)


def _before_load(model: Any, adapter: str, options: dict[str, Any]) -> None:
    """Raise ValueError when PEFT is about to drop the new weights of an adapter, or to put them on a wrong base.

    Warn when it was trained with a mechanism that the base does not use.
    """
    file = _fetch(adapter, FILE, options) if Path(adapter).is_dir() else None
    if file is None:
        return
    about = read_file(adapter, options)
    base = model.get_base_model()
    remedy = f"use hf_attn.load_adapter(base, {adapter!r})"
    if "mechanism" in about:
        if _mechanism(base.config) != about["mechanism"]:
            found = f"{adapter} was trained with {about['mechanism']}, {_name(base)} uses {_mechanism(base.config)}"
            warnings.warn(f"{found}; {remedy}", stacklevel=4)
        return
    record = read_record(base.config)
    if record is None:
        raise ValueError(
            f"{adapter} is an adapter of a model converted to {about['conversion']['name']!r}, and on the plain "
            f"{type(base).__name__} its new weights would be lost; {remedy}"
        )
    _check_record(about, record, _name(base))


def _after_load(model: Any, adapter: str, lacking: list[str]) -> None:
    """Warn of weights of an adapter that PEFT dropped because the base has no place for them."""
    if lacking:
        warnings.warn(
            f"PEFT dropped {len(lacking)} weights of {adapter} ({lacking[0]}, ...): {_name(model.get_base_model())} "
            f"has no place for them. If the adapter has {FILE}, use hf_attn.load_adapter(base, {adapter!r})",
            stacklevel=4,
        )


def _before_push(model: Any, repo: str, options: dict[str, Any]) -> None:
    """Give the repository of an adapter its card."""
    if read_record(model.get_base_model().config) is None or options.get("create_pr"):
        return
    about = json.dumps(describe(model.get_base_model(), model.active_adapter)[0])
    push_card(lambda folder: (folder / FILE).write_text(about), repo, options)
