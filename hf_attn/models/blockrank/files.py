"""Checkpoints of rankers: whole models, adapters beside their options, and their cards."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_attn.integrations.hub.cards import write_card
from hf_attn.integrations.transformers.config import mechanism_options
from hf_attn.mechanisms.blockrank import BlockRankConfig
from hf_attn.models.fingerprint import fingerprint, same_values

# Beside an adapter; `hf_attn.json` there belongs to adapters of converted models.
OPTIONS_FILE = "blockrank.json"


def load(source: str, base_model: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Model, tokenizer, the options stored beside an adapter, and those given by the caller that are ours.

    Raises ValueError for a folder that is not what it is said to be: no adapter, another base, no base named.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {field.name for field in fields(BlockRankConfig)}
    ours = {name: value for name, value in options.items() if name in names}
    hosts = {name: value for name, value in options.items() if name not in names}
    revision = {"revision": hosts["revision"]} if "revision" in hosts else {}
    stored = _read(source, OPTIONS_FILE, revision)
    if stored is None and base_model is not None:
        raise ValueError(f"{source} is no adapter of a BlockRanker ({OPTIONS_FILE} is missing); drop base_model")
    tokenizer = AutoTokenizer.from_pretrained(source, **revision)
    if stored is None:
        return AutoModelForCausalLM.from_pretrained(source, **hosts), tokenizer, {}, ours
    import peft

    if base_model is None or isinstance(base_model, str):
        name = base_model or stored["base_model"]
        if not name:
            raise ValueError(f"{source} does not name its base model; pass base_model=")
        base_model = AutoModelForCausalLM.from_pretrained(name, **{k: v for k, v in hosts.items() if k != "revision"})
    found = _weights(base_model)
    if found["layout"] != stored["fingerprint"]["layout"] or same_values(found, stored["fingerprint"]) is False:
        raise ValueError(
            f"the adapter {source} was trained on another base than {base_model.config._name_or_path!r} "
            f"(its own is {stored['base_model']!r}); pass base_model="
        )
    return peft.PeftModel.from_pretrained(base_model, source, **revision), tokenizer, stored["hf_attn"], ours


def save(ranker: Any, folder: str, metrics: dict[str, float] | None) -> None:
    """Write everything `load` needs, and a card.

    Raises ValueError when `folder` is a file.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{folder} is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)
    model = ranker.model
    adapter = hasattr(model, "get_base_model")
    model.save_pretrained(folder)
    ranker.tokenizer.save_pretrained(folder)
    base = model.get_base_model() if adapter else model
    name = base.config._name_or_path or None
    if adapter:
        stored = {
            "hf_attn": mechanism_options(base.config.hf_attn, "blockrank"),
            "base_model": name,
            "fingerprint": _weights(base),
        }
        (path / OPTIONS_FILE).write_text(json.dumps(stored, indent=1) + "\n")
    _card(ranker, path / "README.md", name, adapter, metrics or {})


def push(ranker: Any, repo_id: str, metrics: dict[str, float] | None, options: dict[str, Any]) -> Any:
    """Create the repository where it is missing, and upload a saved folder."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(ranker, folder, metrics)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def _weights(model: Any) -> dict[str, Any]:
    """What tells this base from another one."""
    weights = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight
        for name, weight in model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    return fingerprint({name: weight.shape for name, weight in weights.items()}, weights.__getitem__)


def _read(source: str, name: str, revision: dict[str, Any]) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **revision,
    )
    return None if found is None else json.loads(Path(found).read_text())


def _card(ranker: Any, file: Path, base: str | None, adapter: bool, metrics: dict[str, float]) -> None:
    options = ranker.options
    hub_id = base if base and not Path(base).exists() else None
    table = "\n".join(
        ["| metric | value |", "|---|---|", *(f"| {name} | {value:g} |" for name, value in metrics.items())]
    )
    write_card(
        file,
        "blockrank",
        {
            "license": "apache-2.0",
            "library_name": "peft" if adapter else "transformers",
            "pipeline_tag": "text-ranking",
            "tags": ["hf-attn", "blockrank"],
            "base_model": hub_id,
            "hf_attn": {"mechanism": "blockrank"},
        },
        title=f"BlockRank ranker of {hub_id or 'a causal language model'}",
        base_text=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "not on the Hub.",
        weights="an adapter; the base model is loaded beside it" if adapter else "a whole model",
        layer=ranker.score_layer,
        heads="all" if options.score_heads is None else ", ".join(map(str, options.score_heads)),
        offset=options.offset_of(ranker.model.config.max_position_embeddings),
        length=options.max_block_length,
        metrics=table if metrics else "None were given.",
    )
