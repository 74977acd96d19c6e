"""The verbs for a diffusers pipeline or model: apply, remove, stats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from hf_attn.integrations.diffusers import stats as counters
from hf_attn.integrations.diffusers.backends import check_parallel
from hf_attn.integrations.diffusers.geometry import MODELS, ModelRow, grid_modules, row_of, site_modules
from hf_attn.integrations.diffusers.hooks import GridHook, RootHook, add_step_hook, remove_step_hook
from hf_attn.integrations.diffusers.processors import SiteProcessor, set_processor, site_processor
from hf_attn.integrations.diffusers.state import PipelineState, Site
from hf_attn.mechanism import DiffusionConfig, Mechanism, get_mechanism, mechanism_names


@dataclass
class Installed:
    """What `apply` put into one model."""

    state: PipelineState
    row: ModelRow
    component: str
    sites: list[str] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)


_INSTALLED: WeakKeyDictionary[nn.Module, Installed] = WeakKeyDictionary()


def apply(target: Any, name: str, **options: Any) -> Any:
    """Let a pipeline, or one of its models, use mechanism `name` from its next call on; returns `target`.

    Args:
        target: a diffusers pipeline (all its models that the table of supported classes has; two transformers share one
            state), or such a model.
        name: a mechanism that supports diffusers, as `hf_attn.list_mechanisms()` shows.
        options: the mechanism's options, and those of `hf_attn.mechanism.DiffusionConfig`: `density`, `dense_steps`,
            `layers`, `min_tokens`, `schedule`, `strict`.

    Raises, and changes nothing: TypeError for a model without supported class; ValueError for unknown names, options,
    values or layers, when a mechanism is applied already, and under ring attention.
    """
    mechanism, config = _checked(name, options)
    models = _models(target)
    _refuse(target, models, config)
    state = PipelineState(mechanism, config, target)
    for component, model in models.items():
        prefix = f"{component}." if len(models) > 1 else ""
        _install(model, state, component, prefix)
    state.watch_scheduler()
    return target


def remove(target: Any) -> Any:
    """Undo `apply`: processors, hooks and the scheduler's methods as they were. Returns `target`.

    Does nothing to a target without a mechanism. A processor that somebody else put in meanwhile stays.
    """
    for model in _models(target).values():
        installed = _INSTALLED.pop(model, None)
        if installed is None:
            continue
        for path in installed.sites:
            attention = model.get_submodule(path)
            ours = attention.processor
            if isinstance(ours, SiteProcessor) and ours.state is installed.state:
                _hand_back(ours)
                set_processor(attention, ours.stock)
        for handle in installed.handles:
            handle.remove()
        remove_step_hook(model)
        if not any(other.state is installed.state for other in _INSTALLED.values()):
            installed.state.forget_scheduler()
    return target


def stats(target: Any) -> dict[str, Any]:
    """What the sites did since `apply` or `reset_stats`, JSON-ready.

    Returns
        mechanism, options: what is set now (mechanism None when none is).
        layers: {number of the site, "component.number" for a further model of the pipeline: name, calls, sparse_calls,
            dense_calls, dense_reasons (by the options' or the mechanism's choice), fallbacks, fallback_reasons (calls
            that did not fit), paths, density, density_by_step, calls_by_step {step: {branch: calls}}, last_q_len}.
        totals: the same summed over layers.

    `density` counts the calls whose mechanism reported pairs, not the dense ones. Compiled graphs count too.
    """
    installed = {name: _INSTALLED[model] for name, model in _models(target).items() if model in _INSTALLED}
    if not installed:
        return {"mechanism": None, "options": {}, "layers": {}, "totals": counters.totals({})}
    state = next(iter(installed.values())).state
    first = next(iter(installed))
    layers: dict[int | str, dict[str, Any]] = {}
    for component, found in installed.items():
        for site in (site for site in found.state.sites if site.component == found.component):
            key = site.index if component == first else f"{component}.{site.index}"
            layers[key] = {"name": site.name, **site.stats.to_dict()}
    options = state.config.to_dict()
    return {
        "mechanism": state.mechanism.name, "options": options, "layers": layers, "totals": counters.totals(layers)
    }  # fmt: skip


def reset_stats(target: Any) -> None:
    """Set all counters to zero."""
    for model in _models(target).values():
        if model in _INSTALLED:
            for site in _INSTALLED[model].state.sites:
                site.stats = counters.SiteStats()


def installed_in(target: Any) -> dict[str, tuple[nn.Module, Installed]]:
    """The models of `target` that have a mechanism, by component name."""
    return {name: (model, _INSTALLED[model]) for name, model in _models(target).items() if model in _INSTALLED}


def supported_models(target: Any) -> dict[str, nn.Module]:
    """The models of `target` that the table has, by component name ("" for a model itself)."""
    return _models(target)


def _checked(name: str, options: dict[str, Any]) -> tuple[Mechanism, DiffusionConfig]:
    mechanism = get_mechanism(name)
    if not mechanism.capabilities.diffusers:
        able = [n for n in mechanism_names() if get_mechanism(n).capabilities.diffusers]
        raise ValueError(
            f"{name!r} does not support diffusers models; mechanisms that do: {', '.join(able) or '(none)'}"
        )
    return mechanism, mechanism.config.from_dict(options)


def _models(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, DiffusionPipeline):
        components = target.components
    else:
        components = {"": target}
    plain = {name: getattr(part, "_orig_mod", part) for name, part in components.items()}
    models = {name: part for name, part in plain.items() if isinstance(part, nn.Module) and row_of(part) is not None}
    if not models:
        raise TypeError(
            f"{type(target).__name__} has no transformer or U-Net of a supported class; supported: {', '.join(MODELS)}"
        )
    return models


def _refuse(target: Any, models: dict[str, nn.Module], config: DiffusionConfig) -> None:
    for component, model in models.items():
        if model in _INSTALLED:
            where = component or type(model).__name__
            raise ValueError(
                f"{where} already uses {_INSTALLED[model].state.mechanism.name!r}; call hf_attn.remove(...) first"
            )
        sites = site_modules(model, row_of(model))
        config.check_layer_count(len(sites))
        for attention in sites.values():
            parallel = getattr(attention.processor, "_parallel_config", None)
            if parallel is not None and parallel.context_parallel_config is not None:
                check_parallel(parallel)


def _install(model: nn.Module, state: PipelineState, component: str, prefix: str) -> None:
    row = row_of(model)
    installed = Installed(state, row, component)
    numbers: dict[str, torch.Tensor] = {}
    for path, module in grid_modules(model, row).items():
        numbers[path] = torch.zeros(5, dtype=torch.int64)
        if path:
            hook = GridHook(state, row, module, numbers[path])
            installed.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    sites = site_modules(model, row)
    for index, (path, attention) in enumerate(sites.items()):
        options = state.config.for_layer(index, len(sites))
        site = Site(prefix + path, component, index, len(sites), row, options)
        state.sites.append(site)
        owner = max((name for name in numbers if path.startswith(name)), key=len)
        set_processor(attention, site_processor(attention.processor, state, site, numbers[owner]))
        installed.sites.append(path)
    root = RootHook(state, row, model, numbers.get("", torch.zeros(5, dtype=torch.int64)), installed.sites)
    installed.handles.append(model.register_forward_pre_hook(root, with_kwargs=True))
    add_step_hook(model, state)
    _INSTALLED[model] = installed


def _hand_back(ours: SiteProcessor) -> None:
    """What was set on our processor meanwhile holds for the stock one."""
    stock = ours.stock
    if ours.dispatched:
        stock._parallel_config = ours._parallel_config
        if stock._attention_backend is not ours.site.backend:
            stock._attention_backend = ours.site.backend
