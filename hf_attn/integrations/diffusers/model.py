"""The verbs for a diffusers pipeline or model: apply, remove, stats."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from hf_attn.integrations.diffusers import stats as counters
from hf_attn.integrations.diffusers.backends import check_parallel
from hf_attn.integrations.diffusers.geometry import MODELS, grid_modules, known_row, row_of, site_modules
from hf_attn.integrations.diffusers.hooks import GridHook, RootHook, add_step_hook, remove_step_hook
from hf_attn.integrations.diffusers.plan import check_plan
from hf_attn.integrations.diffusers.processors import SiteProcessor, can_stand_in, set_processor, site_processor
from hf_attn.integrations.diffusers.state import PipelineState, Site
from hf_attn.mechanism import DiffusionConfig, Mechanism, get_mechanism, mechanism_names

_logger = logging.getLogger(__name__)


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
    return install(target, *checked(name, options, model_id(target)))


def install(target: Any, mechanism: Mechanism, config: DiffusionConfig) -> Any:
    """`apply` with a mechanism and its options as objects."""
    models = supported_models(target)
    _refuse(target, models, config)
    check_plan(getattr(config, "plan", None), models)
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
    for model, root in installed_in(target).values():
        for path in root.sites:
            attention = model.get_submodule(path)
            ours = attention.processor
            if isinstance(ours, SiteProcessor) and ours.state is root.state:
                _hand_back(ours)
                set_processor(attention, ours.stock)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, GridHook) and hook.state is root.state:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        remove_step_hook(model)
        owner = root.state.owner
        if owner is None or not installed_in(owner):
            root.state.forget_scheduler()
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
    installed = {name: root for name, (_, root) in installed_in(target).items()}
    if not installed:
        return {"mechanism": None, "options": {}, "layers": {}, "totals": counters.totals({})}
    first = next(iter(installed))
    state = installed[first].state
    layers: dict[int | str, dict[str, Any]] = {}
    for component, root in installed.items():
        for site in root.site_records():
            key = site.index if component == first else f"{component}.{site.index}"
            layers[key] = {"name": site.name, **site.stats.to_dict()}
    options = state.config.to_dict()
    return {
        "mechanism": state.mechanism.name, "options": options, "layers": layers, "totals": counters.totals(layers)
    }  # fmt: skip


def reset_stats(target: Any) -> None:
    """Set all counters to zero."""
    for _, root in installed_in(target).values():
        for site in root.site_records():
            site.stats = counters.SiteStats()


def installed_in(target: Any) -> dict[str, tuple[nn.Module, RootHook]]:
    """The models of `target` that have a mechanism, with the hook that knows all about it, by component name."""
    found = {}
    for name, model in supported_models(target).items():
        root = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RootHook)), None)
        if root is not None:
            found[name] = model, root
    return found


def model_id(target: Any) -> str:
    """The Hub id or folder that a pipeline or model was loaded from, "" when it was built in memory."""
    return str(getattr(getattr(target, "config", None), "_name_or_path", None) or "")


def checked(name: str, options: dict[str, Any], source: str = "") -> tuple[Mechanism, DiffusionConfig]:
    """The mechanism and its checked options; ValueError for one that does not support diffusers.

    `source` is what the target was loaded from: `preset="auto"` takes the preset published for it, and a user who names
    nothing is told of it.
    """
    mechanism = get_mechanism(name)
    if not mechanism.capabilities.diffusers:
        able = [n for n in mechanism_names() if get_mechanism(n).capabilities.diffusers]
        raise ValueError(
            f"{name!r} does not support diffusers models; mechanisms that do: {', '.join(able) or '(none)'}"
        )
    config = cast(type[DiffusionConfig], mechanism.config)  # what `capabilities.diffusers` says
    preset = config.preset_for(source)
    if options.get("preset") == "auto":
        if preset is None:
            raise ValueError(
                f"preset='auto': {name!r} has no preset for {source or 'a model that was built in memory'}; name one, "
                "or leave preset out for the default options"
            )
        options = {**options, "preset": preset}
    elif preset is not None and not {"preset", "density", "bounds", "schedule"} & options.keys():
        _logger.warning(
            "%s: settings were published for %s; preset='auto' takes them (%r), without it the default options run",
            name, source, preset,
        )  # fmt: skip
    return mechanism, config.from_dict(options)


def supported_models(target: Any) -> dict[str, nn.Module]:
    """The models of `target` that the table has, by component name ("" for a model itself); TypeError without any."""
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
    for component, (model, root) in installed_in(target).items():
        raise ValueError(
            f"{component or type(model).__name__} already uses {root.state.mechanism.name!r}; call "
            "hf_attn.remove(...) first"
        )
    for model in models.values():
        sites = site_modules(model)
        config.check_layer_count(len(sites))
        for path, attention in sites.items():
            if not can_stand_in(type(attention.processor)):
                raise ValueError(
                    f"{path} has a {type(attention.processor).__name__}, which calls neither the attention dispatcher "
                    "of diffusers nor scaled_dot_product_attention, so a mechanism would never be called; go back to "
                    f"the processor that {type(model).__name__} has when it is loaded"
                )
            parallel = getattr(attention.processor, "_parallel_config", None)
            if parallel is not None and parallel.context_parallel_config is not None:
                check_parallel(parallel)


def _install(model: nn.Module, state: PipelineState, component: str, prefix: str) -> None:
    row = known_row(model)
    numbers: dict[str, torch.Tensor] = {}
    for path, module in grid_modules(model).items():
        numbers[path] = torch.zeros(5, dtype=torch.int64)
        if path:
            module.register_forward_pre_hook(GridHook(state, row, module, numbers[path]), with_kwargs=True)
    sites = site_modules(model)
    for index, (path, attention) in enumerate(sites.items()):
        options = state.config.for_layer(index, len(sites))
        site = Site(prefix + path, component, index, len(sites), row, options, number=len(state.sites))
        state.sites.append(site)
        owner = max((name for name in numbers if path.startswith(name)), key=len)
        set_processor(attention, site_processor(attention.processor, state, site, numbers[owner]))
    root = RootHook(state, row, model, numbers.get("", torch.zeros(5, dtype=torch.int64)), component, list(sites))
    model.register_forward_pre_hook(root, with_kwargs=True)
    add_step_hook(model, state)


def _hand_back(ours: SiteProcessor) -> None:
    """What was set on our processor meanwhile holds for the stock one."""
    stock = ours.stock
    if ours.dispatched:
        stock._parallel_config = ours._parallel_config
        if stock._attention_backend is not ours.site.backend:
            stock._attention_backend = ours.site.backend
