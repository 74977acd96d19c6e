"""One pipeline's state: the mechanism, the sites, and where the denoising loop stands."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary, ref

from torch import nn

from hf_attn.integrations.diffusers.geometry import ModelRow
from hf_attn.integrations.diffusers.stats import SiteStats
from hf_attn.mechanism import DiffusionConfig, Mechanism

_PROBE_STEPS = 1000
_slots = itertools.count()
# Compiled graphs carry only a slot number; a state lives as long as the models that hold it.
_STATES: WeakValueDictionary[int, PipelineState] = WeakValueDictionary()


@dataclass
class Site:
    """One self-attention module.

    Args:
        name: its path in the model, after the component's name where a pipeline has several models.
        component: its model's name in the pipeline, "" without one.
        index, count: its number among the model's sites, and their number.
        number: its number among the sites of all models of the pipeline.
        row: its model's row of the table.
        options: what the mechanism's options are here, None = dense.
        backend: the diffusers backend that the user set on the module, for its dense calls.
    """

    name: str
    component: str
    index: int
    count: int
    row: ModelRow
    options: DiffusionConfig | None
    backend: Any = None
    number: int = 0
    stats: SiteStats = field(default_factory=SiteStats)
    _at: dict[float | None, DiffusionConfig] = field(default_factory=dict, repr=False)

    def options_at(self, density: float | None) -> DiffusionConfig:
        """The options, of a site that has some, with another density (of a schedule)."""
        options = self.options
        assert options is not None
        if density == options.density:
            return options
        if density not in self._at:
            self._at[density] = replace(options, density=density)
        return self._at[density]


class PipelineState:
    """What the sites of one pipeline (or one model) share.

    The denoising step comes from the first of these that is there: the pipeline's `cache_context`, its scheduler,
    changes of the `timestep` argument (models without a pipeline, eager only). Attention calls are never counted:
    caches skip them and guidance doubles them.
    """

    def __init__(self, mechanism: Mechanism, config: DiffusionConfig, owner: Any) -> None:
        self.mechanism, self.config = mechanism, config
        self.sites: list[Site] = []
        self.slot = next(_slots)
        self.branch: str | None = None
        self.scheduler: Any = None
        self.tensor_rank: dict[str, int] = {}
        self.by_backend = False
        self._owner = ref(owner)
        self._warned: set[str] = set()
        self._context_step: int | None = None
        self._context_steps: int | None = None
        self._names: Counter[str] = Counter()
        self._scheduler_steps = 0
        self._timesteps: list[float] | None = None
        self._timestep_step: int | None = None
        self._last_timestep: float | None = None
        _STATES[self.slot] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineState:
        # A copied transformer belongs to the same denoising loop.
        return self

    @property
    def owner(self) -> Any:
        """The pipeline or model of the `apply`, None when it is gone."""
        return self._owner()

    def warn_once(self, message: str) -> None:
        """Warn, at most once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"hf_attn: {message}", stacklevel=2)

    # -- the step ----------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """The denoising step of the running call, from 0; None when nobody tells."""
        if self._context_step is not None:
            return self._context_step
        return self._scheduler_steps if self.scheduler is not None else self._timestep_step

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of the run; None when nobody tells."""
        if self._context_steps is not None:
            return self._context_steps
        timesteps = self._run_timesteps()
        return len(timesteps) if timesteps else None

    @property
    def timestep(self) -> float | None:
        """The scheduler's value at this step."""
        timesteps, step = self._run_timesteps(), self.step
        if timesteps and step is not None and step < len(timesteps):
            return timesteps[step]
        return self._last_timestep

    def enter_context(self, context: Any) -> None:
        """The pipeline opens (or, with None, closes) the context of one denoiser call."""
        if context is None:
            self.branch = self._context_step = self._context_steps = None
            return
        self.branch = getattr(context, "name", context)  # older versions of diffusers hand over the bare name
        self._names[self.branch] += 1
        told = getattr(context, "step_index", None)
        self._context_step = self._names[self.branch] - 1 if told is None else told
        self._context_steps = getattr(context, "num_inference_steps", None)

    @contextmanager
    def at_last_step(self) -> Iterator[None]:
        """Pretend that a long run is at its end, for a probe; the run that is really going on is not disturbed."""
        kept = self.branch, self._context_step, self._context_steps, self._last_timestep, self._timestep_step
        self.branch, self._context_step, self._context_steps = "probe", _PROBE_STEPS - 1, _PROBE_STEPS
        try:
            yield
        finally:
            self.branch, self._context_step, self._context_steps, self._last_timestep, self._timestep_step = kept

    def restart(self) -> None:
        """A run ends or begins: count from 0 again."""
        self._names.clear()
        self._scheduler_steps = 0
        self._timesteps = None
        self._timestep_step = self._last_timestep = None

    def scheduler_stepped(self) -> None:
        """The scheduler has made a step: the next calls belong to the one after."""
        self._scheduler_steps += 1

    def note_timestep(self, value: float) -> None:
        """A model without a pipeline is called with this `timestep`; a rise begins a new run."""
        if self._timestep_step is None or self._last_timestep is None or value > self._last_timestep:
            self._timestep_step = 0
        elif value != self._last_timestep:
            self._timestep_step += 1
        self._last_timestep = value

    def watch_scheduler(self) -> None:
        """Listen to the pipeline's scheduler, also when another one took its place."""
        owner = self.owner
        scheduler = getattr(owner, "scheduler", None) if not isinstance(owner, nn.Module) else None
        if scheduler is self.scheduler:
            return
        self.forget_scheduler()
        self.scheduler = scheduler
        if scheduler is not None:
            self.restart()
            for name, listener in (("step", self.scheduler_stepped), ("set_timesteps", self.restart)):
                if hasattr(scheduler, name):
                    setattr(scheduler, name, _Listened(scheduler, name, self, listener))

    def forget_scheduler(self) -> None:
        """Give the scheduler its own methods back."""
        for name in ("step", "set_timesteps"):
            if isinstance(vars(self.scheduler or self).get(name), _Listened):
                delattr(self.scheduler, name)
        self.scheduler = None

    def _run_timesteps(self) -> list[float] | None:
        """The scheduler's values of this run, read from the device once a run."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if self._timesteps is None and timesteps is not None:
            values = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
            # Image-to-image pipelines enter the schedule late.
            self._timesteps = values[getattr(self.scheduler, "begin_index", None) or 0 :]
        return self._timesteps


class _Listened:
    """A scheduler's method that tells a listener after each call; keeps the signature that pipelines inspect."""

    def __init__(self, scheduler: Any, name: str, state: PipelineState, listener: Any) -> None:
        method = getattr(scheduler, name)
        functools.update_wrapper(self, method)
        self.method, self.state, self.listener = method, state, listener

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        # A copy of the scheduler that serves somebody else must not count here.
        if self.state.scheduler is self.method.__self__:
            self.listener()
        return result


def state_of_slot(slot: int) -> PipelineState | None:
    """The state with this number, None when it is gone."""
    return _STATES.get(slot)
