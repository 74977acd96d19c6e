"""Published attention systems as plugins: `attn_implementation="hf_attn_moba"` in transformers.

Importing this package registers the names `hf_attn_<mechanism>`, the `config.hf_attn` property, and the model types and
pipelines of hf_attn.models, nothing else: no mechanism, model, compiler or further library is loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_attn.checks import require_hosts as _require_hosts

_require_hosts("torch", "transformers")

from hf_attn import models as _models  # noqa: E402
from hf_attn.integrations import diffusers_names as _diffusers_names  # noqa: E402
from hf_attn.integrations.transformers import registration as _registration  # noqa: E402

if TYPE_CHECKING:
    from hf_attn.analysis.snr import recommend
    from hf_attn.front import (
        apply,
        calibrate,
        compare,
        convert,
        doctor,
        enable_continuous_batching,
        list_mechanisms,
        load_adapter,
        load_plan,
        push,
        register_mechanism,
        remove,
        reset_stats,
        save_adapter,
        save_plan,
        set_card,
        spec,
        stats,
        unregister_mechanism,
    )
    from hf_attn.integrations.diffusers.plan import ParoPlan
    from hf_attn.integrations.transformers.cache import LServeCache, cache_report
    from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
    from hf_attn.mechanisms.lserve import LServeConfig, classify_heads, load_duo_heads
    from hf_attn.models.blockrank import BlockRanker

# Where each public name lives; it is imported when first asked for.
_HOMES = {
    "apply": "hf_attn.front",
    "convert": "hf_attn.front",
    "calibrate": "hf_attn.front",
    "compare": "hf_attn.front",
    "doctor": "hf_attn.front",
    "enable_continuous_batching": "hf_attn.front",
    "list_mechanisms": "hf_attn.front",
    "load_plan": "hf_attn.front",
    "register_mechanism": "hf_attn.front",
    "remove": "hf_attn.front",
    "reset_stats": "hf_attn.front",
    "load_adapter": "hf_attn.front",
    "push": "hf_attn.front",
    "save_adapter": "hf_attn.front",
    "save_plan": "hf_attn.front",
    "set_card": "hf_attn.front",
    "spec": "hf_attn.front",
    "stats": "hf_attn.front",
    "unregister_mechanism": "hf_attn.front",
    "BlockRanker": "hf_attn.models.blockrank",
    "Capabilities": "hf_attn.mechanism",
    "Mechanism": "hf_attn.mechanism",
    "MechanismConfig": "hf_attn.mechanism",
    "recommend": "hf_attn.analysis.snr",
    "ParoPlan": "hf_attn.integrations.diffusers.plan",
    "LServeCache": "hf_attn.integrations.transformers.cache",
    "LServeConfig": "hf_attn.mechanisms.lserve",
    # Named in a pipeline's model_index.json as classes of this module, where diffusers also looks for their base.
    "LaMambaDiffPipeline": "hf_attn.models.lamamba_diff",
    "LaMambaDiffTransformer2DModel": "hf_attn.models.lamamba_diff",
    "MoHDiTTransformer2DModel": "hf_attn.models.moh_dit",
    "ModelMixin": "diffusers",
    "cache_report": "hf_attn.integrations.transformers.cache",
    "classify_heads": "hf_attn.mechanisms.lserve",
    "load_duo_heads": "hf_attn.mechanisms.lserve",
}

__all__ = [
    "BlockRanker",
    "Capabilities",
    "LServeCache",
    "LServeConfig",
    "Mechanism",
    "MechanismConfig",
    "ParoPlan",
    "apply",
    "convert",
    "cache_report",
    "calibrate",
    "classify_heads",
    "compare",
    "doctor",
    "enable_continuous_batching",
    "list_mechanisms",
    "load_adapter",
    "load_duo_heads",
    "load_plan",
    "push",
    "recommend",
    "register_mechanism",
    "remove",
    "reset_stats",
    "save_adapter",
    "save_plan",
    "set_card",
    "spec",
    "stats",
    "unregister_mechanism",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hf-attn")
    except PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'hf_attn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})


_registration.install()
_models.install()
_diffusers_names.install()
