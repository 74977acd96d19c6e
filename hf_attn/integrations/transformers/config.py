"""`config.hf_attn`: the options of a mechanism inside a model's own config, saved and loaded with it."""

from __future__ import annotations

import json
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hf_attn.mechanism import parse_config

PREFIX = "hf_attn_"
_KEY = "hf_attn"
# Keys of the dict that are about the config, not about the mechanism.
_POLICY = ("mechanism", "targets", "required")


def install() -> None:
    """Add the property to `PreTrainedConfig`; harmless when repeated.

    Raises RuntimeError when the attribute exists already and is not ours.
    """
    existing = getattr(PreTrainedConfig, _KEY, None)
    if existing is None:
        PreTrainedConfig.hf_attn = property(_get, _set, doc=_set.__doc__)
        return
    if getattr(getattr(existing, "fget", None), "__module__", None) != __name__:
        raise RuntimeError(
            f"PreTrainedConfig already has an attribute 'hf_attn' ({existing!r}) that hf-attn did not add; "
            "another package claims the name, and both cannot be used in one process"
        )


def _get(self: PreTrainedConfig) -> dict[str, Any] | None:
    return self.__dict__.get(_KEY)


def _set(self: PreTrainedConfig, value: dict[str, Any] | None) -> None:
    """Options of an hf_attn mechanism, or `None`: a flat dict `{"mechanism": name, option: value, ...}`.

    Besides the mechanism's options it may hold
        targets: names of the sub-configs that get the mechanism, "" for the config itself. Default: "text_config" where
            there is one, else "".
        required: True writes the implementation's name into config.json, so that loading without hf-attn fails instead
            of running dense.
    "mechanism" may be left out when the implementation is already an hf_attn name. An implementation the user asked for
    by name is never changed. Raises ValueError for an unknown mechanism, option, value or target.
    """
    # transformers also calls this while it parses a config.json, after attn_implementation was applied.
    if not value:
        _clear(self)
        return
    value = _normalised(self, value)
    mechanism = value["mechanism"]
    parse_config(mechanism_options(value, mechanism) | {"mechanism": mechanism})
    targets = target_names(self, value)
    configs = {name: target_config(self, name) for name in targets}
    _clear(self)
    self.__dict__[_KEY] = value
    for config in configs.values():
        if config is not self:
            # Without the policy keys: the sub-config must be able to parse its own copy.
            config.__dict__[_KEY] = {key: v for key, v in value.items() if key not in ("targets", "required")}
        if getattr(config, "_attn_implementation", None) is None:
            config._attn_implementation_internal = PREFIX + mechanism
    if value.get("required"):
        named = PREFIX + mechanism
        self.__dict__["attn_implementation"] = named if targets == [""] else dict.fromkeys(targets, named)


def _clear(config: PreTrainedConfig) -> None:
    for target in [config, *_sub_configs(config).values()]:
        target.__dict__.pop(_KEY, None)
        target.__dict__.pop("attn_implementation", None)


def _normalised(config: PreTrainedConfig, value: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON will give it back (string keys, lists), so that a saved config equals the one in memory."""
    if not isinstance(value, dict):
        raise ValueError(f"hf_attn must be a dict of options or None, got {value!r}; example: {{'mechanism': 'moba'}}")
    try:
        value = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"hf_attn must hold JSON values only, got {value!r} ({error})") from None
    if "mechanism" not in value:
        configs = [config, *_sub_configs(config).values()]
        names = [mechanism_of(getattr(c, "_attn_implementation", None)) for c in configs]
        named = next((name for name in names if name), None)
        if named is None:
            raise ValueError(
                f"hf_attn={value!r} does not say which mechanism: add a 'mechanism' key, or pass "
                "attn_implementation='hf_attn_<mechanism>' as well"
            )
        value = {"mechanism": named, **value}
    if not isinstance(value.get("required", False), bool):
        raise ValueError(f"hf_attn['required'] must be true or false, got {value['required']!r}")
    return value


def target_names(config: PreTrainedConfig, value: dict[str, Any]) -> list[str]:
    """The (sub-)configs that `value` is about: its "targets", or the default ones."""
    targets = value.get("targets")
    if targets is None:
        return ["text_config"] if "text_config" in _sub_configs(config) else [""]
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"hf_attn['targets'] must be a list of sub-config names ('' = the config), got {targets!r}")
    return targets


def target_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config called `name`, "" for `config` itself; raises ValueError naming the sub-configs there are."""
    if name == "":
        return config
    found = _sub_configs(config)
    if name not in found:
        known = ", ".join(repr(key) for key in ["", *found])
        raise ValueError(f"hf_attn target {name!r} is not a sub-config of {type(config).__name__}; targets: {known}")
    return found[name]


def _sub_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    found = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: sub for name, sub in found.items() if isinstance(sub, PreTrainedConfig)}


def mechanism_of(implementation: str | None) -> str | None:
    """The mechanism of an implementation name: "moba" for "hf_attn_moba" and "hf_attn_moba@1a2b", else `None`."""
    if not isinstance(implementation, str) or not implementation.startswith(PREFIX):
        return None
    return implementation.removeprefix(PREFIX).split("@")[0]


def mechanism_options(value: dict[str, Any] | None, mechanism: str) -> dict[str, Any]:
    """The options in `value` that belong to `mechanism`; none (its defaults) when `value` is about another one."""
    if not value or value.get("mechanism") != mechanism:
        return {}
    return {key: v for key, v in value.items() if key not in _POLICY}
