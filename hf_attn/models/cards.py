"""Model cards of converted models and of their adapters, filled from what the checkpoint says about itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_attn.integrations.hub.cards import check_card, write_card
from hf_attn.integrations.hub.names import hub_id
from hf_attn.models.record import RECORD

FACTS = ("trained", "data", "lengths", "license", "base_model", "metrics")
_OURS = "<!-- written by hf-attn"
# What cards that nobody filled in have in common: those PEFT and transformers generate.
_EMPTY = "[More Information Needed]"
_NOT_STATED = "not stated"
_COLUMNS = ("dense", "before", "after")
_TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageClassification": "image-classification"}


def set_card(model: Any, **facts: Any) -> None:
    """See `hf_attn.set_card`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    in_diffusers = isinstance(model.config, Mapping)
    record = model.config.get(RECORD) if in_diffusers else getattr(model.config, RECORD, None)
    if record is None:
        raise ValueError(
            f"{type(model).__name__} is no converted model: hf_attn.set_card is for those of hf_attn.convert"
        )
    record = {**record, "card": {**record.get("card", {}), **check_facts(facts)}}
    if in_diffusers:
        model.register_to_config(**{RECORD: record})
    else:
        setattr(model.config, RECORD, record)


def check_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` without the empty ones; ValueError for unknown names and for metrics of another form."""
    unknown = sorted(facts.keys() - set(FACTS))
    if unknown:
        raise ValueError(f"a card has no {', '.join(unknown)}; it has {', '.join(FACTS)}")
    facts = {name: value for name, value in facts.items() if value is not None}
    for name, row in facts.get("metrics", {}).items():
        wrong = not isinstance(row, dict) or not row or row.keys() - set(_COLUMNS)
        if wrong or not all(isinstance(value, int | float) for value in row.values()):
            raise ValueError(
                f"metrics[{name!r}] must be numbers by column ({', '.join(_COLUMNS)}), got {row!r}; example: "
                '{"held-out loss": {"dense": 2.68, "before": 3.06, "after": 2.99}}'
            )
    return facts


def write_model_card(folder: str | os.PathLike, *, repo: str | None = None, **facts: Any) -> Path:
    """Write README.md of a folder with a converted model or an adapter of one, and check it.

    Args:
        repo: Hub id for the usage snippet; None writes "this-repository".
        facts: as in `hf_attn.set_card`; they win over those saved in the checkpoint.

    Raises ValueError for other folders, and FileExistsError for a card that somebody wrote.
    """
    folder = Path(folder)
    about, adapter = _about(folder)
    file = folder / "README.md"
    if file.is_file() and not is_generated(file.read_text(encoding="utf-8")):
        raise FileExistsError(f"{file} was not written by hf-attn and is never overwritten; edit it, or remove it")
    facts = {**about.get("card", {}), **check_facts(facts)}
    data, fields = _fields(about, adapter, facts, repo)
    write_card(file, "converted_adapter" if adapter else "converted_model", data, **fields)
    return file


def is_generated(text: str) -> bool:
    """Whether a card is one of ours that nobody took over, or one that nobody filled in."""
    return _OURS in text or _EMPTY in text


def check_folder(folder: str | os.PathLike) -> Path:
    """README.md of a folder that is ready for the Hub; ValueError says what is wrong, and what to do."""
    folder = Path(folder)
    _about(folder)
    unsafe = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(pattern))
    if unsafe:
        raise ValueError(f"{folder} holds {', '.join(unsafe)}: only safetensors and JSON are pushed; remove them")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in names if not (folder / name).is_file())
    else:
        missing = [] if list(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise ValueError(f"{folder} is incomplete: it lacks {', '.join(missing)}; save the model again")
    check_card(folder / "README.md")
    return folder / "README.md"


def _about(folder: Path) -> tuple[dict[str, Any], bool]:
    """What a folder says about its conversion, and whether it holds an adapter."""
    for name, adapter in (("hf_attn.json", True), ("config.json", False)):
        file = folder / name
        if not file.is_file():
            continue
        values = json.loads(file.read_text())
        if adapter and "conversion" not in values:  # of a model with a mechanism
            continue
        if adapter:
            base = {f"base_{key}": value for key, value in values["base"].items()}
            return {
                **values["conversion"],
                "card": values.get("card", {}),
                **base,
                "base_model": base["base_name"],
            }, True
        if values.get(RECORD):
            also = {"base_length": values.get("max_position_embeddings"), "auto": _auto_class(values)}
            return {**values[RECORD], **also}, False
    raise ValueError(
        f"{folder} holds no converted model (config.json with {RECORD!r}) and no adapter of one (hf_attn.json); write "
        "it with save_pretrained of a model made by hf_attn.convert, or with hf_attn.save_adapter"
    )


def _auto_class(config: dict[str, Any]) -> str:
    """The Auto class that loads a checkpoint, by what its `auto_map` says about its architecture."""
    names = {name.rpartition(".")[2]: auto for auto, name in config.get("auto_map", {}).items()}
    return names.get((config.get("architectures") or [""])[0], "AutoModelForCausalLM")


def _fields(
    about: dict[str, Any], adapter: bool, facts: dict[str, Any], repo: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of the card and what its template asks for."""
    base = hub_id(facts.get("base_model")) or about["base_model"]
    linked = f"[{base}](https://huggingface.co/{base})" if base else None
    metrics = facts.get("metrics", {})
    options = "".join(f", {name}={value!r}" for name, value in about["options"].items())
    title = f"{(base or about['base_type']).rpartition('/')[2]}, {about['name']}"
    auto = about.get("auto", "AutoModelForCausalLM")
    task = _TASKS.get(auto) if about.get("base_length") or auto != "AutoModelForCausalLM" else None
    data = {
        "license": facts.get("license", "other"),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["hf-attn", about["name"]],
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "hf_attn": {"conversion": about["name"]},
        **_results(title, metrics, task or "text-generation"),
    }
    patterns, length = about["new_weights"], about.get("base_length")
    fields = {
        "title": title,
        "system": about["name"],
        "base_text": linked or f"a {about['base_type']} model",
        "base": linked or f"a {about['base_type']} model that is not on the Hub",
        "conversion": f'hf_attn.convert(model, "{about["name"]}"{options})',
        "new_text": f"{len(patterns)} kind(s) of new weights, all others those of the base."
        if patterns
        else "no new weights.",
        "new_weights": ", ".join(f"`{name}`" for name in patterns) or "none",
        "usage": _usage(repo or "this-repository", base or "the-base-model", adapter, auto),
        "metrics": _table(metrics),
        "trained": facts.get("trained", _NOT_STATED),
        "trained_on": facts.get("data", _NOT_STATED),
        "lengths": facts.get("lengths") or (f"up to {length} tokens, as the base" if length else _NOT_STATED),
    }
    if adapter:
        values = about["base_fingerprint"]
        fields["fingerprint"] = (
            f"{values['parameters']:,} parameters, fingerprint {values['values'] or values['layout']}"
        )
    return data, fields


def _usage(repo: str, base: str, adapter: bool, auto: str) -> str:
    if adapter:
        return f'import hf_attn\n\nmodel = hf_attn.load_adapter("{base}", "{repo}")'
    return f'import hf_attn\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repo}")'


def _table(metrics: dict[str, dict[str, float]]) -> str:
    """Rows of metrics; columns that no metric has are left out."""
    columns = [name for name in _COLUMNS if any(name in row for row in metrics.values())]
    if not columns:
        return "Not measured."
    names = {"dense": "base", "before": "converted, not trained", "after": "trained"}
    lines = ["| |" + "|".join(f" {names[name]} " for name in columns) + "|", "|---|" + "---|" * len(columns)]
    for metric, row in metrics.items():
        cells = (f" {row[name]:g} " if name in row else " - " for name in columns)
        lines.append(f"| {metric} |" + "|".join(cells) + "|")
    return "\n".join(lines)


def _results(title: str, metrics: dict[str, dict[str, float]], task: str) -> dict[str, Any]:
    """The last column of every metric as `model-index`."""
    from huggingface_hub import EvalResult

    last = {metric: next(row[name] for name in reversed(_COLUMNS) if name in row) for metric, row in metrics.items()}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=task.partition("-")[0],
            dataset_name="held-out data, see the card",
            metric_type=metric.replace(" ", "_"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in last.items()
    ]
    return {"model_name": title, "eval_results": results} if results else {}
