"""The public verbs: they find the integration that knows a target's type, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from os import PathLike
from types import ModuleType
from typing import Any

from hf_attn import mechanism as registry
from hf_attn.mechanism import Capabilities, Mechanism


def apply(target: Any, name: str, **options: Any) -> Any:
    """Let `target` use mechanism `name`; returns `target`.

    Args:
        target: a transformers model, a diffusers pipeline or a diffusers model.
        name: a mechanism's name, see `list_mechanisms()`.
        options: the mechanism's options, and `layers={index or slice: options or None}` for single layers (None =
            dense). A transformers model saves them (`config.hf_attn`).

    Raises TypeError for other targets, ValueError for unknown names, options or values, and for models that would
    ignore the mechanism.
    """
    return _integration(target, "apply").apply(target, name, **options)


def convert(model_or_repo: Any, name: str, *, load: dict[str, Any] | None = None, **options: Any) -> Any:
    """Turn a model into one with the new weights of system `name`; returns a model of a class of this package.

    Args:
        model_or_repo: a transformers causal language model, or a Hub id or folder of one, which is loaded straight into
            the new class.
        name: "moba": Llama, Qwen2, Qwen3 and Mistral with a key convolution. "landmark": the same families with
            landmark tokens and retrieval of cached blocks. "moh": the same families, ViT and DiT, with Mixture-of-Head
            attention. "uoe": the same families as unions of experts. "titans": the same families with a memory beside
            the attention.
        load: arguments of `from_pretrained` for a Hub id or folder (`dtype`, `device_map`, `revision`, ...).
        options: the system's options, see docs/<name>.md. For "moba" those of the mechanism, and `kconv_width` (odd,
            default 3).

    The result saves, loads and pushes as `AutoModelForCausalLM` and gives the logits of the model it came from until it
    is trained. A given model is left as it is, but both share their weights: training one changes the other, so drop
    it. Raises TypeError for PEFT or compiled models and other objects, ValueError for unknown names, options, model
    types, and for quantised or offloaded models.
    """
    from hf_attn.models.conversion import convert as run

    return run(model_or_repo, name, load=load, **options)


def save_adapter(model: Any, folder: str | PathLike, **options: Any) -> None:
    """Save the adapters of a PEFT model with `hf_attn.json` beside them.

    Its base was made by `hf_attn.convert`, or uses a mechanism.

    The file names the conversion, its options and the base (type, sizes, a fingerprint of its weights), and
    `hf_attn_weights.safetensors` holds the new weights that the adapter does not train. `model.save_pretrained`,
    `model.push_to_hub` and the Trainer write both too; this is for callers who want an error where they would not.

    Args:
        options: those of `PeftModel.save_pretrained`.

    For a mechanism the file has its options and the base. Raises TypeError for other objects, ValueError for a base
    that is neither.
    """
    from hf_attn.models.adapters import save_adapter as run

    run(model, folder, **options)


def load_adapter(base: Any, adapter: str | PathLike, *, load: dict[str, Any] | None = None, **options: Any) -> Any:
    """Put an adapter of a converted model, or of one with a mechanism, on its base; returns a PeftModel.

    Args:
        base: the plain model the conversion started from (it is converted as the adapter needs it) or the converted
            one: a model, or a Hub id or folder. A mechanism the adapter was trained with is applied.
        adapter: folder or Hub id of the adapter; must have `hf_attn.json`.
        load: arguments of `from_pretrained` for a base given by name (`dtype`, `device_map`, `quantization_config`).
        options: those of `PeftModel.from_pretrained` (`is_trainable`, `adapter_name`, `revision`, ...).

    Raises ValueError for a base of another architecture, size, conversion or with other weights, naming both, and for
    an adapter without `hf_attn.json`. Warns when weights cannot be compared: quantised, or float16 against another
    format.
    """
    from hf_attn.models.adapters import load_adapter as run

    return run(base, adapter, load=load, **options)


def set_card(model: Any, **facts: Any) -> None:
    """Say what the model card of a converted model, or of its adapter, shall tell; saved in its config.

    Args:
        facts: `trained`, `data`, `lengths`, `license`, `base_model` (strings) and `metrics`, rows
            `{name: {"dense": x, "before": x, "after": x}}`: the base, the converted model and the trained one.

    `save_pretrained` of adapters, `push_to_hub`, `hf-attn card` and `hf-attn push` write the card. Raises ValueError
    for other models, unknown names and metrics of another form.
    """
    from hf_attn.models.cards import set_card as run

    run(model, **facts)


def push(folder: str | PathLike, repo: str, *, private: bool = False, **facts: Any) -> str:
    """Push a folder with a converted model, or an adapter of one, with a filled card; returns the address.

    Args:
        repo: Hub id; made when it does not exist.
        facts: as in `set_card`, for the card.

    Raises ValueError, before anything is sent, for an incomplete folder, weights that are no safetensors, and a card
    that lacks something.
    """
    from hf_attn.models.pushing import push as run

    return run(folder, repo, private=private, **facts)


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

    A string is a diffusers pipeline on the Hub or in a folder: only its configurations are read, to predict the gain.

    Options: see `doctor` of `hf_attn.integrations.transformers.doctor` and `hf_attn.integrations.diffusers.doctor`.
    """
    if isinstance(target, str | PathLike):
        from hf_attn.integrations.diffusers.doctor import doctor_repository

        return doctor_repository(target, **options)
    # An adapter on a wrong base shows only from outside, so PEFT models are taken as they are.
    base = target.get_base_model() if hasattr(target, "get_base_model") else target
    return _integration(base, "doctor").doctor(target, **options)


def compare(pipe: Any, name: str, call: dict[str, Any], *, path: str | PathLike | None = None, **options: Any) -> Any:
    """Run a diffusers pipeline dense and with a mechanism from the same noise: PSNR of every frame, and a picture.

    Arguments and result: `hf_attn.integrations.diffusers.compare.compare`.
    """
    from hf_attn.integrations.diffusers.compare import compare as run

    return run(pipe, name, call, path=path, **options)


def calibrate(target: Any, name: str, **options: Any) -> Any:
    """Measure on real inputs, without training, what mechanism `name` needs to know about `target`.

    "lserve": which KV heads look far back; options and result: `hf_attn.analysis.head_classes.calibrate_heads`.
    "paro" (or "paroattention"), for diffusers: axis orders and block masks; options and result:
    `hf_attn.analysis.paro_calibration.calibrate_paro`. The target is left as it was. Raises ValueError for names
    without a calibration.
    """
    _integration(target, "calibrate")
    from hf_attn.analysis.calibration import calibrate as run

    return run(target, name, **options)


def load_plan(
    target: Any, path_or_repo: str | PathLike, *, loading: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Let a diffusers pipeline or model use a calibrated plan of a folder or Hub repository; returns the plan.

    Args:
        path_or_repo: what `save_plan` wrote, or a pipeline with a plan in its folder "sparse_attention".
        loading: arguments of `from_pretrained` (`subfolder`, `revision`, `token`, ...).
        options: options of the mechanism, as `apply` takes them (`dense_steps`, `min_tokens`, `qk_bits`, ...).

    Raises ValueError when the plan was made for another model class, number of layers or heads, when there is no plan,
    and when a mechanism is applied already. Another grid or text length shows when the pipeline is called: such calls
    run dense with one warning, or raise under `strict=True`.
    """
    _integration(target, "load_plan")
    from hf_attn.integrations.diffusers import plan

    return plan.load_plan(target, path_or_repo, options=options, **(loading or {}))


def save_plan(target: Any, path: str | PathLike, **options: Any) -> None:
    """Write the plan that a diffusers pipeline or model uses (or a plan itself) to a folder.

    Args:
        options: arguments of `save_pretrained` (`push_to_hub=True`, `repo_id=`, ...).

    Raises ValueError when there is no plan.
    """
    _integration(target, "save_plan")
    from hf_attn.integrations.diffusers import plan

    plan.save_plan(target, path, **options)


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
        host = "transformers"
    # Without importing diffusers for a target that is not of it.
    elif any(base.__module__.startswith("diffusers.") for base in type(target).__mro__):
        host = "diffusers"
    else:
        host = None
    if host is not None:
        return importlib.import_module(f"hf_attn.integrations.{host}.{'doctor' if verb == 'doctor' else 'model'}")
    hint = ""
    if hasattr(target, "get_base_model"):
        hint = "; for a PEFT model pass model.get_base_model()"
    elif hasattr(target, "_orig_mod"):
        hint = "; pass the model itself, before torch.compile"
    raise TypeError(
        f"hf_attn.{verb} takes a transformers PreTrainedModel, a diffusers pipeline or a diffusers model, got "
        f"{type(target).__name__}{hint}"
    )
