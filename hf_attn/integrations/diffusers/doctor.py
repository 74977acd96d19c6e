"""Is the mechanism of a pipeline really called, by every layer, and what can it gain at this size?"""

from __future__ import annotations

from collections import Counter
from os import PathLike
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hf_attn.integrations.diffusers.geometry import MODELS, resolve_grid
from hf_attn.integrations.diffusers.hooks import RootHook, check_sites
from hf_attn.integrations.diffusers.model import checked, installed_in, supported_models
from hf_attn.integrations.diffusers.potential import Potential, Size, can_count, count_work, example_inputs
from hf_attn.integrations.diffusers.stats import SiteStats
from hf_attn.mechanism import DiffusionConfig
from hf_attn.ops.cpu_kernel import cpu_kernel_state
from hf_attn.report import DoctorReport

DENSITIES = (0.3, 0.2)
# Below this even all of the attention's work gone would hardly be noticed.
_WORTH = 1.3


def doctor(
    target: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    probe: bool = False,
) -> DoctorReport:
    """Check that the mechanism set on a pipeline or model is in place, and say what it can gain.

    Args:
        target: a diffusers pipeline or one of its models; without a mechanism only the possible gain is told.
        height, width, num_frames: size in pixels to predict for, one frame for images. The count runs on an empty copy
            of the model: no weights, no memory.
        probe: also run one denoiser call with random inputs of that size and count which layers arrive. Weights,
            statistics and random state stay untouched.

    Raises TypeError for targets without a supported model, ValueError for a size that is missing or not positive; all
    else it finds wrong is listed in the report.
    """
    report = DoctorReport()
    models, installed = supported_models(target), installed_in(target)
    size = _size(height, width, num_frames) if probe or height is not None or width is not None else None
    if not installed:
        report.problems.append("no mechanism is set; call hf_attn.apply(pipe, name)")
    for component, (model, found) in installed.items():
        _check_installed(component, model, found, report)
    if any(parameter.device.type == "cpu" for model, _ in installed.values() for parameter in model.parameters()):
        report.lines.append(cpu_kernel_state())
    if probe and size is not None:
        for component, (model, found) in installed.items():
            _probe(component, model, found, size, target, report)
    if size is not None:
        config = next((found.state.config for _, found in installed.values()), None)
        for component, model in models.items():
            predict(component or type(model).__name__, model, size, config, report, pipe=target)
    return report


def doctor_repository(
    repository: str | PathLike,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    mechanism: str | None = None,
    **options: Any,
) -> DoctorReport:
    """What a pipeline on the Hub or in a folder can gain: reads configurations only, never weights.

    Args:
        repository: Hub id or folder of a diffusers pipeline.
        height, width, num_frames: size in pixels; needed.
        mechanism, options: a mechanism to predict for.

    Raises OSError when there is no such pipeline, TypeError when it has no supported model.
    """
    size = _size(height, width, num_frames)
    config = None if mechanism is None else checked(mechanism, options, str(repository))[1]
    index = DiffusionPipeline.load_config(repository)
    report, found = DoctorReport(), False
    for component, entry in index.items():
        if isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] in MODELS:
            found = True
            cls = getattr(diffusers, entry[1])
            model = _empty(cls, repository, component)
            predict(component, model, size, config, report, pipe=_scale_factors(repository, index))
    if not found:
        raise TypeError(
            f"{repository} ({index.get('_class_name')}) has no model of a supported class; supported: "
            f"{', '.join(MODELS)}"
        )
    return report


def _empty(cls: Any, repository: str | PathLike, component: str) -> nn.Module:
    """A component without weights."""
    with torch.device("meta"):
        return cls.from_config(cls.load_config(repository, subfolder=component))


def _scale_factors(repository: str | PathLike, index: dict[str, Any]) -> Any:
    """What a pipeline would say of its VAE, as far as the VAE's configuration tells."""
    library, name = index.get("vae") or (None, None)
    if library != "diffusers" or name is None:
        return None
    config = getattr(diffusers, name).load_config(repository, subfolder="vae")
    spatial, temporal = config.get("scale_factor_spatial"), config.get("scale_factor_temporal")
    return SimpleNamespace(vae_scale_factor_spatial=spatial, vae_scale_factor_temporal=temporal)


def predict(
    name: str, model: nn.Module, size: Size, config: DiffusionConfig | None, report: DoctorReport, pipe: Any = None
) -> Potential | None:
    """Add what sparse attention can gain for one model at `size` to `report`; the count, None where it cannot be made.

    Args:
        model: may be on the meta device.
        config: the mechanism's options, None without one.
        pipe: its pipeline, for the VAE's scale factors.
    """
    if not can_count(model):
        report.lines.append(f"{name}: its work cannot be counted on an empty copy, so no prediction")
        return None
    work = count_work(model, size, pipe)
    told = ", ".join(f"{work.bound(density):.2f}x at density {density}" for density in DENSITIES)
    report.lines.append(
        f"{name} at {size}: {work.tokens} tokens, attention is {work.share:.1%} of the denoiser's work; at most "
        f"{told}, never more than {work.bound(0.0):.2f}x"
    )
    density = None if config is None else config.fitted_density
    if config is not None and density is not None:
        share = config.dense_steps if isinstance(config.dense_steps, float) else 0.0
        with_steps = f", with {share:.0%} of the steps dense" if share else ""
        report.lines.append(
            f"with these options (density {density}{with_steps}): at most {work.bound(density, share):.2f}x"
        )
    if work.bound(DENSITIES[-1]) < _WORTH:
        report.lines.append("not worth it at this size: larger images or longer videos gain more")
    if config is not None and work.tokens < config.min_tokens:
        report.lines.append(f"note: fewer than min_tokens={config.min_tokens} tokens, so every call stays dense")
    return work


def _size(height: int | None, width: int | None, num_frames: int) -> Size:
    return Size(_counted("height", height), _counted("width", width), _counted("num_frames", num_frames))


def _counted(name: str, value: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1 (pixels, frames), got {value!r}")
    return value


def _check_installed(component: str, model: nn.Module, found: RootHook, report: DoctorReport) -> None:
    """Mechanism and options; processors that are gone; what ran so far."""
    state = found.state
    where = component or type(model).__name__
    report.lines.append(f"mechanism: {state.mechanism.name} in {len(found.sites)} layers of {where}")
    options = state.config.to_dict().items()
    report.lines.append("options: " + ", ".join(f"{key}={value!r}" for key, value in options))
    lost = check_sites(model, found.sites, state, warn=False)
    if lost:
        culprit = type(model.get_submodule(lost[0]).processor).__name__
        report.problems.append(
            f"{len(lost)} of {len(found.sites)} attention processors of {where} were replaced by {culprit}; call "
            "hf_attn.remove and hf_attn.apply again"
        )
    sites = found.site_records()
    if sites and all(site.options is None for site in sites):
        report.problems.append(f"layers= leaves every layer of {where} dense, so {state.mechanism.name} does nothing")
    _tell_counts(where, sites, "so far", report)


def _tell_counts(where: str, sites: list[Any], when: str, report: DoctorReport) -> None:
    calls = sum(site.stats.calls for site in sites)
    sparse = sum(site.stats.sparse for site in sites)
    report.lines.append(f"{when}: {calls} attention calls of {where}, {sparse} sparse")
    for kind in ("dense", "fallbacks"):
        reasons: Counter[str] = Counter()
        for site in sites:
            reasons.update(getattr(site.stats, kind))
        for reason, count in reasons.items():
            label = "dense" if kind == "dense" else "dense, though it should not be"
            report.lines.append(f"{when}: {count} calls {label}: {reason}")


def _probe(component: str, model: nn.Module, found: RootHook, size: Size, target: Any, report: DoctorReport) -> None:
    """One denoiser call at a late step; a problem when layers do not arrive."""
    where = component or type(model).__name__
    if not can_count(model):
        report.lines.append(f"{where} cannot be probed; run the pipeline and read hf_attn.stats")
        return
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype | None = None, fill: float | None = None) -> Tensor:
        if fill is not None:
            return torch.full(shape, fill, dtype=dtype or parameter.dtype, device=parameter.device)
        return torch.randn(shape, generator=generator).to(parameter)

    state = found.state
    sites = found.site_records()
    kept = [site.stats for site in sites]
    for site in sites:
        site.stats = SiteStats()
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), state.at_last_step():
            model(**example_inputs(model, size, make, target), return_dict=False)
        missing = [site.index for site in sites if not site.stats.calls]
        if missing:
            report.problems.append(f"layers {missing} of {where} were never called")
        _tell_counts(where, sites, "in the probe", report)
        _tell_grid(sites, model, found, report)
    except Exception as error:
        report.problems.append(f"a call of {where} at {size} fails: {type(error).__name__}: {error}")
    finally:
        for site, stats in zip(sites, kept, strict=True):
            site.stats = stats
        for module, training in flags:
            module.training = training


def _tell_grid(sites: list[Any], model: nn.Module, found: RootHook, report: DoctorReport) -> None:
    numbers = model.get_submodule(found.sites[0]).processor.numbers
    grid = resolve_grid(numbers.tolist(), sites[0].stats.q_len)
    if grid is not None:
        shape = "x".join(map(str, grid.shape))
        report.lines.append(f"grid: {shape} tokens, {grid.text_before} others before and {grid.text_after} after")
