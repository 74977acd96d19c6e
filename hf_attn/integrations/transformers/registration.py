"""Names for transformers: every mechanism as `hf_attn_<name>`, attention and mask function together."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from typing import Any

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_attn.integrations.transformers import cache
from hf_attn.integrations.transformers import config as config_property
from hf_attn.integrations.transformers.attention import attention_forward
from hf_attn.integrations.transformers.config import PREFIX
from hf_attn.integrations.transformers.masks import index_mask
from hf_attn.mechanism import mechanism_names, parse_config

# transformers matches these by substring and would take the name for something else.
_RESERVED = ("flash", "sdpa", "flex_attention", "paged", "eager")


def install() -> None:
    """Register all mechanisms and the config property. Imports no mechanism; harmless when repeated."""
    config_property.install()
    cache.install()
    for name in mechanism_names():
        register(name)


def register(name: str) -> str:
    """Register `hf_attn_<name>` and return it."""
    check_name(name)
    return _register(PREFIX + name, name, None)


def check_name(name: str) -> None:
    """Raise ValueError for names transformers would take for something else."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or any(word in name for word in _RESERVED):
        raise ValueError(
            f"mechanism name {name!r} cannot be registered with transformers: use lower-case letters, digits and '_', "
            f"and none of {', '.join(_RESERVED)}"
        )


def unregister(name: str) -> None:
    """Forget `hf_attn_<name>` and its specs."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        mapping = interface._global_mapping
        for key in [key for key in mapping if key == PREFIX + name or key.startswith(f"{PREFIX}{name}@")]:
            del mapping[key]


def is_registered(implementation: str) -> bool:
    """Whether transformers knows both the attention and the mask function of a name."""
    return all(implementation in found._global_mapping for found in (AttentionInterface, AttentionMaskInterface))


def attention_is_registered(implementation: str) -> bool:
    """Whether transformers knows at least the attention function of a name."""
    return implementation in AttentionInterface._global_mapping


def bound_options(implementation: str) -> dict[str, Any] | None:
    """The options a `spec` name carries; `None` for names that read `config.hf_attn`."""
    function = AttentionInterface._global_mapping.get(implementation)
    return getattr(function, "keywords", {}).get("hf_attn_options")


def spec(name: str, **options: Any) -> str:
    """A name for `attn_implementation=` that carries its own options, e.g. `"hf_attn_moba@1f0c2a9e"`.

    The same options always give the same name. It lives in this process only and wins over `config.hf_attn`; to save
    options with a model use `hf_attn={...}` or `hf_attn.apply`. Raises ValueError for unknown options or bad values.
    """
    parse_config({**options, "mechanism": name})
    text = json.dumps(options, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return _register(f"{PREFIX}{name}@{digest}", name, json.loads(text))


def _register(implementation: str, name: str, options: dict[str, Any] | None) -> str:
    # Always both: without a mask function transformers passes no mask at all and padding is silently lost.
    AttentionInterface.register(implementation, partial(attention_forward, hf_attn_name=name, hf_attn_options=options))
    AttentionMaskInterface.register(implementation, index_mask)
    return implementation
