"""Is the mechanism of a model really called, by every layer, and what will it do? One tiny forward tells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn.call import AttentionCall
from hf_attn.integrations.transformers import model as model_verbs
from hf_attn.integrations.transformers import repairs, silent
from hf_attn.integrations.transformers.attention import Resolved, watching
from hf_attn.integrations.transformers.config import PREFIX, mechanism_of
from hf_attn.integrations.transformers.registration import attention_is_registered, is_registered
from hf_attn.integrations.transformers.stats import model_stats, separate_stats
from hf_attn.report import DoctorReport

LENGTHS = (4096, 32768, 131072)


@dataclass
class Seen:
    """One attention layer's call during the probe."""

    call: AttentionCall
    resolved: Resolved
    reason: str | None


def doctor(
    model: PreTrainedModel,
    *,
    seq_len: int | Sequence[int] = LENGTHS,
    input_ids: Tensor | None = None,
    plot: str | PathLike | None = None,
    layer: int | None = None,
) -> DoctorReport:
    """Check that the mechanism set on `model` is really used, and say what it will do.

    Runs a few forwards without gradients or dropout (plain, padded, packed); weights, training flags, statistics and
    random state stay untouched.

    Args:
        model: a transformers model, or a PEFT model around one.
        seq_len: prefill length(s) in tokens to predict the density for; those above the model's limit are left out.
        input_ids: tokens `[1, n]` for the probe; default 16 random ones, with `plot` up to 1024. Vision models are
            probed with a random image of their size.
        plot: file for a picture (PNG) of the key blocks that each query block selects in the probe; needs matplotlib.
        layer: the layer to draw; default the first sparse one.

    Raises ValueError when a picture is asked of a mechanism or layer that has none; everything else it finds wrong is
    listed in the report.
    """
    report = DoctorReport()
    target, model = model, silent.base_model(model)
    report.problems += silent.wrong_base(target, model)
    name = _check_names(model, report)
    if name is None:
        return report
    report.problems += silent.wrong_towers(model, name)
    try:
        model_verbs.refuse_model(model, name)
    except ValueError as error:
        report.problems.append(str(error))
    if input_ids is None and _reads_images(model):
        seen, paths = _probe(model, {"pixel_values": _random_image(model)}, report)
        sparse = _check_layers(model, name, seen, report)
    else:
        if input_ids is None:
            input_ids = _random_tokens(model, 16 if plot is None else 1024)
        seen, paths = _probe(model, {"input_ids": input_ids, "use_cache": False}, report)
        sparse = _check_layers(model, name, seen, report)
        if seen:
            _check_rows(model, name, input_ids[:, :16].to(model.device), report)
    _describe_path(model, paths, report)
    _describe_limits(model, report)
    if sparse:
        lengths = [seq_len] if isinstance(seq_len, int) else seq_len
        _predict(sparse, lengths, _position_limit(_text(model)), report)
    if plot is not None:
        _draw(seen, layer, plot, report)
    return report


def _check_names(model: PreTrainedModel, report: DoctorReport) -> str | None:
    """The mechanism the implementation names; problems where name, registration and config disagree."""
    implementations = model_verbs.implementations(model.config)
    ours = {target: impl for target, impl in implementations.items() if mechanism_of(impl)}
    wanted = (model.config.hf_attn or {}).get("mechanism")
    mended = repairs.installed(model)
    report.lines += [f"repairs: {', '.join(mended)}"] if mended else []
    if not ours:
        if wanted is None and mended:
            report.lines.append("no mechanism is set: the layers that are not repaired run as the model has them")
        elif wanted is None:
            report.problems.append("no mechanism is set; call hf_attn.apply(model, name), e.g. name='moba'")
        else:
            report.problems.append(
                f"config.hf_attn names {wanted!r}, but the model runs {implementations['']!r}: hf_attn was imported "
                f"after the model was loaded, or another implementation was asked for. Call hf_attn.apply(model, "
                f"{wanted!r}, ...), or import hf_attn before from_pretrained."
            )
        return None
    target, implementation = next(iter(ours.items()))
    name = mechanism_of(implementation)
    if not is_registered(implementation):
        if attention_is_registered(implementation):
            report.problems.append(
                f"{implementation!r} has no mask function, so transformers passes it no mask: padding and packing are "
                f"lost. Something registered the attention alone; call hf_attn.apply(model, {name!r}, ...), which "
                "registers both"
            )
            return None
        report.problems.append(
            f"{implementation!r} is not registered in this process (a name made by hf_attn.spec elsewhere?); "
            f"call hf_attn.apply(model, {name!r}, ...)"
        )
        return None
    try:
        options = model_verbs.active(model)[1]
    except ValueError as error:
        report.problems.append(str(error))
        return None
    report.lines.append(f"mechanism: {name} ({implementation}{f' on {target}' if target else ''})")
    report.lines.append("options: " + ", ".join(f"{key}={value!r}" for key, value in options.items()))
    if wanted is not None and wanted != name:
        report.lines.append(f"note: config.hf_attn is about {wanted!r}, so {name!r} runs with its own defaults")
    return name


def _random_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Random token ids `[1, length]` from a generator of their own."""
    config = _text(model)
    limit = _position_limit(config)
    length = length if limit is None else min(length, limit)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, length), generator=generator)


def _reads_images(model: PreTrainedModel) -> bool:
    """A vision model: its one input is an image."""
    return model.main_input_name == "pixel_values"


def _random_image(model: PreTrainedModel) -> Tensor:
    """`[1, channels, height, width]` of the model's own size (224 where the config has none)."""
    size = getattr(model.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    shape = 1, getattr(model.config, "num_channels", 3), height, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def _probe(
    model: PreTrainedModel, inputs: dict[str, Any], report: DoctorReport
) -> tuple[dict[nn.Module, Seen], dict[str, int]]:
    """The calls of one forward by attention module, and how often which path ran; an error becomes a problem."""
    seen: dict[nn.Module, Seen] = {}

    def note(call: AttentionCall, resolved: Resolved, reason: str | None) -> None:
        seen[call.layer.module] = Seen(call, resolved, reason)

    flags = [(module, module.training) for module in model.modules()]
    paths: dict[str, int] = {}
    try:
        model.eval()
        with torch.no_grad(), separate_stats(), watching(note):
            model(**{name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
            for layer in model_stats(model).values():
                for path, count in layer["paths"].items():
                    paths[path] = paths.get(path, 0) + count
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
        report.problems.append(f"a forward of {shapes} fails: {type(error).__name__}: {error}")
    finally:
        for module, training in flags:
            module.training = training
    return seen, paths


def _check_layers(model: PreTrainedModel, name: str, seen: dict[nn.Module, Seen], report: DoctorReport) -> list[Seen]:
    """The layers that are not dense; a problem when layers never arrive or all of them are dense."""
    expected = _attention_layers(_text(model))
    if not seen:
        report.problems.append(
            f"{PREFIX}{name} was never called: {type(model).__name__} ignores attn_implementation (it has attention "
            "code of its own); use a model whose attention goes through transformers' AttentionInterface"
        )
        return []
    numbers = [s.call.layer.index for s in seen.values()]
    if expected is not None and None not in numbers and (missing := sorted(set(expected) - set(numbers))):
        report.problems.append(f"layers {_ranges(missing)} never called {PREFIX}{name}")
    report.lines.append(f"called by {len(seen)} layers" + (f" of {len(expected)}" if expected is not None else ""))
    for reason in sorted({s.reason for s in seen.values() if s.reason}):
        layers = [n for n, s in zip(numbers, seen.values(), strict=True) if s.reason == reason]
        report.lines.append(f"dense layers {_ranges(layers)}: {reason}")
    sparse = [s for s in seen.values() if s.reason is None]
    if not sparse:
        hint = ""
        if any("sliding window" in (s.reason or "") for s in seen.values()):
            hint = "; from_pretrained(..., sliding_window=None) gives them full attention, if that suits the model"
        report.problems.append(f"every layer stays dense, so {name} does nothing{hint}")
    return sparse


def _check_rows(model: PreTrainedModel, name: str, ids: Tensor, report: DoctorReport) -> None:
    """Does the mechanism learn of padding and of packed sequences?"""
    with separate_stats():
        report.problems += silent.dropped_masks(model, name, ids)
        packing = silent.lost_packing(model, ids)
    if packing is not None:
        (report.problems if model.training else report.lines).append(packing)


def _describe_path(model: PreTrainedModel, paths: dict[str, int], report: DoctorReport) -> None:
    from hf_attn.ops.backend import choose_path
    from hf_attn.ops.cpu_kernel import cpu_kernel_state

    variable = os.environ.get("HF_ATTN_BACKEND")
    setting = f"HF_ATTN_BACKEND={variable}" if variable else "HF_ATTN_BACKEND unset"
    try:
        parameter = next(model.parameters())
        path = choose_path("block_sparse_attention", parameter)
        report.lines.append(f"path of the ops: {path} ({setting})")
        if parameter.device.type == "cpu":
            report.lines.append(cpu_kernel_state())
    except (RuntimeError, ValueError) as error:
        report.problems.append(str(error))
    if paths:
        ran = ", ".join(f"{path} in {count} layers" for path, count in sorted(paths.items()))
        report.lines.append(f"in the probe: {ran}")


def _describe_limits(model: PreTrainedModel, report: DoctorReport) -> None:
    """What the config holds that no mechanism honours."""
    config = _text(model)
    for key in ("attention_dropout", "attn_pdrop"):
        rate = getattr(config, key, None)
        if rate:
            text = f"{key}={rate} is not supported: training raises, evaluation is not affected; set it to 0"
            (report.problems if model.training else report.lines).append(text)
    try:
        model_verbs.refuse_config(config, model_verbs.active(model)[0] or "")
    except ValueError as error:
        report.problems.append(str(error))


def _predict(sparse: list[Seen], lengths: Sequence[int], limit: int | None, report: DoctorReport) -> None:
    """Facts of a prefill at several lengths, from the mechanism's own description of its first sparse layer."""
    resolved = sparse[0].resolved
    if resolved.mechanism.describe is None:
        return
    possible = [n for n in lengths if limit is None or n <= limit] or ([limit] if limit else [])
    for length in possible:
        facts = dict(resolved.mechanism.describe(resolved.config, length, length))
        density = facts.pop("density", None)
        told = [] if density is None else [f"density {density:.1%}"]
        told += [f"{key} {value}" for key, value in facts.items()]
        if density and not facts.get("dense"):
            told.append(f"attention at most {1 / density:.1f}x less work")
        report.lines.append(f"prefill of {length} tokens: " + ", ".join(told))


def _draw(seen: dict[nn.Module, Seen], layer: int | None, plot: str | PathLike, report: DoctorReport) -> None:
    sparse = {s.call.layer.index: s for s in seen.values() if s.reason is None}
    if layer is None and sparse:
        layer = next(iter(sparse))
    if layer not in sparse:
        raise ValueError(f"layer {layer} ran no mechanism, so there is nothing to draw; sparse layers: {list(sparse)}")
    chosen = sparse[layer]
    mechanism = chosen.resolved.mechanism
    if mechanism.select is None:
        raise ValueError(f"{mechanism.name} selects no blocks, so it has no picture; leave out plot=")
    with torch.no_grad():
        pattern = mechanism.select(chosen.call, chosen.resolved.config)
    pattern.plot(plot, causal=chosen.call.causal, title=f"{mechanism.name}, layer {layer}, {chosen.call.k_len} tokens")
    report.plotted_layer = layer
    report.lines.append(f"picture of layer {layer}: {os.fspath(plot)}")


def _text(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config()


def _position_limit(config: PreTrainedConfig) -> int | None:
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _attention_layers(config: PreTrainedConfig) -> list[int] | None:
    """Numbers of the layers that have attention, `None` when the config does not tell."""
    count = getattr(config, "num_hidden_layers", None)
    types = getattr(config, "layer_types", None)
    if count is None or (types is not None and len(types) != count):
        return None
    return [i for i in range(count) if types is None or types[i].endswith("attention") and "linear" not in types[i]]


def _ranges(numbers: list[Any]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    known = sorted(n for n in numbers if n is not None)
    runs = [list(g) for _, g in groupby(enumerate(known), lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text or f"({len(numbers)} without numbers)"
