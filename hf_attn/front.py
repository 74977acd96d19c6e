"""The public verbs: they find the integration that knows a target's type, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, fields
from types import ModuleType
from typing import Any

from hf_attn import mechanism as registry
from hf_attn.mechanism import Capabilities, Mechanism


def apply(target: Any, name: str, **options: Any) -> Any:
    """Let `target` use mechanism `name`; returns `target`.

    Args:
        target: a transformers decoder language model.
        name: a mechanism's name, see `list_mechanisms()`.
        options: the mechanism's options, and `layers={index or slice: options or None}` for single layers (None =
            dense). They are saved with the model (`config.hf_attn`).

    Raises TypeError for other targets, ValueError for unknown names, options or values, and for models that would
    ignore the mechanism.
    """
    return _integration(target, "apply").apply(target, name, **options)


def remove(target: Any) -> Any:
    """Undo `apply`: everything as it was before. Returns `target`."""
    return _integration(target, "remove").remove(target)


def stats(target: Any) -> dict[str, Any]:
    """What the attention layers did: mechanism, options, counters by layer, totals. JSON-ready."""
    return _integration(target, "stats").stats(target)


def reset_stats(target: Any) -> None:
    """Set the counters of `stats` to zero."""
    _integration(target, "reset_stats").reset_stats(target)


def doctor(target: Any, **options: Any) -> Any:
    """Is the mechanism really called, which path runs, what would be ignored? Returns a report: `.ok`, printable.

    Options: see `hf_attn.integrations.transformers.doctor.doctor`.
    """
    # An adapter on a wrong base shows only from outside, so PEFT models are taken as they are.
    _integration(target.get_base_model() if hasattr(target, "get_base_model") else target, "doctor")
    from hf_attn.integrations.transformers.doctor import doctor as examine

    return examine(target, **options)


def calibrate(target: Any, name: str, **options: Any) -> Any:
    """Measure on real text, without training, what mechanism `name` needs to know about `target`.

    "lserve": which KV heads look far back; options and result: `hf_attn.analysis.head_classes.calibrate_heads`. The
    target is left as it was. Raises ValueError for names without a calibration.
    """
    _integration(target, "calibrate")
    from hf_attn.analysis.calibration import calibrate as run

    return run(target, name, **options)


def enable_continuous_batching() -> None:
    """Let transformers' `generate_batch` run models with a mechanism, for the rest of the process."""
    from hf_attn.integrations.transformers import continuous

    continuous.enable_continuous_batching()


def spec(name: str, **options: Any) -> str:
    """A string for `attn_implementation=` that carries options, valid in this process; the same for equal options."""
    from hf_attn.integrations.transformers import registration

    return registration.spec(name, **options)


def register_mechanism(mechanism: Mechanism) -> Mechanism:
    """Add a mechanism of your own under `hf_attn_<name>`; returns it. Raises ValueError when the name is taken."""
    from hf_attn.integrations.transformers import registration

    if isinstance(mechanism, Mechanism):
        registration.check_name(mechanism.name)
    registry.register_mechanism(mechanism)
    registration.register(mechanism.name)
    return mechanism


def unregister_mechanism(name: str) -> None:
    """Take back `register_mechanism`."""
    from hf_attn.integrations.transformers import registration

    registry.unregister_mechanism(name)
    registration.unregister(name)


class MechanismTable(list):
    """Rows of `list_mechanisms`; prints as a table."""

    def __str__(self) -> str:
        flags = [f.name for f in fields(Capabilities)]
        cells = [["name", *flags, "summary"]]
        for row in self:
            marks = ["yes" if row["capabilities"][flag] else "-" for flag in flags]
            cells.append([row["name"], *marks, row["summary"]])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        return "\n".join("  ".join(row).rstrip() for row in padded)


def list_mechanisms() -> MechanismTable:
    """All mechanisms: rows {name, summary, source, capabilities: {train, decode, padding, ...}}; prints well."""
    rows = []
    for name in registry.mechanism_names():
        found = registry.get_mechanism(name)
        rows.append(
            {
                "name": name,
                "summary": found.summary,
                "source": found.source,
                "capabilities": asdict(found.capabilities),
            }
        )
    return MechanismTable(rows)


def _integration(target: Any, verb: str) -> ModuleType:
    """The integration module that handles `target`; TypeError names what is accepted."""
    from transformers.modeling_utils import PreTrainedModel

    if isinstance(target, PreTrainedModel):
        from hf_attn.integrations.transformers import model

        return model
    hint = ""
    if hasattr(target, "get_base_model"):
        hint = "; for a PEFT model pass model.get_base_model()"
    elif hasattr(target, "_orig_mod"):
        hint = "; pass the model itself, before torch.compile"
    raise TypeError(f"hf_attn.{verb} takes a transformers PreTrainedModel, got {type(target).__name__}{hint}")
