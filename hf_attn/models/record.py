"""What a converted model says about where it came from: `config.hf_attn_conversion`, saved in config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

RECORD = "hf_attn_conversion"
# Keys that say which class and file a config came from, or how it was loaded, not what the model is.
_NOT_FIELDS = frozenset(
    ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "dtype", "torch_dtype")
    + ("quantization_config", "_class_name", "_diffusers_version", RECORD)
)


def write_record(
    config: Any, name: str, base_type: str, before: Mapping[str, Any], options: dict[str, Any], base_model: str | None
) -> None:
    """Put the record of a conversion into our `config` (a config object, or arguments of a diffusers class).

    `fields` are the names of the config's entries that the base's config (`before`) lacks or has otherwise: with their
    values, anybody can make the same model from the same base again.
    """
    ours = config if isinstance(config, dict) else config.to_dict()
    fields = [key for key, value in ours.items() if key not in _NOT_FIELDS and before.get(key, _Missing) != value]
    record = {
        "name": name,
        "options": json.loads(json.dumps(options, default=lambda value: f"<{type(value).__name__}>")),
        "base_type": base_type,
        "base_model": base_model,
        "fields": sorted(fields),
        "new_weights": [],
    }
    if isinstance(config, dict):
        config[RECORD] = record
    else:
        setattr(config, RECORD, record)


def read_record(config: Any) -> dict[str, Any] | None:
    """The record of a converted model's config with the present values of its fields; None for other models.

    Keys: name, options, base_type, base_model (Hub id or None), fields {name: value}, new_weights (patterns).
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    record = values.get(RECORD)
    if record is None:
        return None
    return {**record, "fields": {key: values.get(key) for key in record["fields"]}}


def patterns(names: Iterable[str]) -> list[str]:
    """Names with every layer index written as `*`, each once."""
    return sorted({".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names})


def is_new(record: dict[str, Any], name: str) -> bool:
    """Whether a weight of a converted model is one that its base does not have."""
    return patterns([name])[0] in record["new_weights"]


class _Missing:
    """Equal to nothing a config holds."""
