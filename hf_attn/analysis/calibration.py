"""`hf_attn.calibrate`: what each mechanism can measure about a model on real inputs, without training."""

from __future__ import annotations

import importlib
from typing import Any

from hf_attn.checks import did_you_mean
from hf_attn.mechanism import mechanism_names

# Mechanism -> "module:function"; the function takes (target, **options) and leaves the target as it was.
CALIBRATIONS = {
    "lserve": "hf_attn.analysis.head_classes:calibrate_heads",
    "paroattention": "hf_attn.analysis.paro_calibration:calibrate_paro",
}
# Short names.
_ALIASES = {"paro": "paroattention"}


def calibrate(target: Any, name: str, **options: Any) -> Any:
    """Run the calibration of mechanism `name`; raises ValueError naming those that have one."""
    name = _ALIASES.get(name, name)
    if name not in CALIBRATIONS:
        known = ", ".join(CALIBRATIONS)
        what = f"mechanism {name!r} has nothing to calibrate" if name in mechanism_names() else f"unknown name {name!r}"
        raise ValueError(f"{what}{did_you_mean(name, list(CALIBRATIONS))}. Calibrations: {known}.")
    module, _, function = CALIBRATIONS[name].partition(":")
    return getattr(importlib.import_module(module), function)(target, **options)
