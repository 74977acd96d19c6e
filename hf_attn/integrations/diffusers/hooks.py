"""What a model tells before each forward: its token grid, its step, and whether our processors still stand."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch._dynamo.eval_frame
from diffusers.hooks.hooks import BaseState, HookFunctionReference, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from hf_attn.integrations.diffusers.geometry import ModelRow
from hf_attn.integrations.diffusers.processors import SiteProcessor
from hf_attn.integrations.diffusers.state import PipelineState, Site

_NAME = "hf_attn_step"


class GridHook:
    """A forward pre-hook that writes the grid of the running forward into `numbers`.

    A plain hook of torch sees the inputs before any context parallelism splits them. Where a compiler traces through it
    (a hook inside a model, a model inside a compiled function) it does tensor work only; the hook of a compiled model
    itself runs as ordinary Python in front of the graph.
    """

    def __init__(self, state: PipelineState, row: ModelRow, module: nn.Module, numbers: Tensor) -> None:
        self.state, self.row, self.numbers = state, row, numbers
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._read: tuple[Any, Any, list[int]] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self.traced(module, args, kwargs)
        else:
            self.eager(module, args, kwargs)

    def traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The grid, as part of a graph."""
        self._write(self.row.geometry(module.config, self._getter(args, kwargs)))

    @torch.compiler.disable
    def eager(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The grid, and whatever else Python can see."""
        self._write(self._numbers(module, self._getter(args, kwargs)))

    def _getter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def get(name: str) -> Any:
            where = self.names.index(name)
            return args[where] if where < len(args) else kwargs.get(name)

        return get

    def _write(self, numbers: list[int] | Tensor) -> None:
        if isinstance(numbers, Tensor):
            self.numbers.copy_(numbers)
        else:
            for place, number in enumerate(numbers):
                self.numbers[place] = number

    def _numbers(self, module: nn.Module, get: Any) -> list[int] | Tensor:
        """As the table says; what is read from a tensor on a device is read once for that tensor."""
        ids = get("img_ids") if "img_ids" in self.names else None
        if ids is None or ids.is_inference():
            return self.row.geometry(module.config, get)
        text = get("encoder_hidden_states").shape[1]
        key = (ids._version, text)
        if self._read is None or self._read[0]() is not ids or self._read[1] != key:
            self._read = weakref.ref(ids), key, torch.as_tensor(self.row.geometry(module.config, get)).tolist()
        return self._read[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> GridHook:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        numbers = self.numbers.clone()
        # The processors of the copy hold the same tensor.
        numbers = memo.setdefault(id(self.numbers), numbers)
        vars(twin).update({**vars(self), "numbers": numbers, "_read": None})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


class RootHook(GridHook):
    """The hook of the model itself; a model that has one has a mechanism.

    Args:
        component: the model's name in its pipeline.
        sites: paths of its self-attention modules.
    """

    def __init__(
        self,
        state: PipelineState,
        row: ModelRow,
        module: nn.Module,
        numbers: Tensor,
        component: str,
        sites: list[str],
    ) -> None:
        super().__init__(state, row, module, numbers)
        self.component, self.sites = component, sites

    def site_records(self) -> list[Site]:
        """The records of the model's sites, in order."""
        return [site for site in self.state.sites if site.component == self.component]

    def traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The grid, where the model's own input tells it."""
        if self.row.grid_modules is None:
            super().traced(module, args, kwargs)

    @torch.compiler.disable
    def eager(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The grid, the step of a model without a pipeline, and whether our processors still stand."""
        get = self._getter(args, kwargs)
        self.state.watch_scheduler()
        check_sites(module, self.sites, self.state)
        self.state.tensor_rank[self.component] = _tensor_rank(module)
        if self.state.scheduler is None and self.state.branch is None and not torch.is_grad_enabled():
            timestep = get("timestep")
            if timestep is not None:
                # One timestep a token in image-to-video models: frames that are given have 0.
                self.state.note_timestep(float(torch.as_tensor(timestep).max()))
        if self.row.grid_modules is None:
            self._write(self._numbers(module, get))


# In front of a compiled model the hook is a frame of its own: leave it to Python, which sees more than a graph. Without
# this (private) function the hook is a small graph before the model's.
_skip_code = getattr(torch._dynamo.eval_frame, "skip_code", None)
if _skip_code is not None:
    _skip_code(GridHook.__call__.__code__)


def _tensor_rank(module: nn.Module) -> int:
    """Which part of the heads this process has under tensor parallelism."""
    parallel = getattr(getattr(module, "_parallel_config", None), "tensor_parallel_config", None)
    return 0 if parallel is None else parallel._mesh.get_local_rank()


def check_sites(module: nn.Module, sites: list[str], state: PipelineState, warn: bool = True) -> list[str]:
    """Paths of the sites where no processor of ours stands any more; warns once, naming what stands there."""
    lost = []
    for path in sites:
        processor = module.get_submodule(path).processor
        if not isinstance(processor, SiteProcessor) or processor.state is not state:
            lost.append(path)
    if lost and warn:
        culprit = type(module.get_submodule(lost[0]).processor).__name__
        state.warn_once(
            f"{len(lost)} of {len(sites)} attention processors of {type(module).__name__} were replaced by {culprit} "
            f"after hf_attn.apply (fuse_qkv_projections, set_attn_processor, load_ip_adapter, ...), so "
            f"{state.mechanism.name!r} no longer runs there. Call hf_attn.remove and hf_attn.apply again."
        )
    return lost


def _no_hook() -> Any:
    """What a hook is in a pickled model."""
    return _do_nothing


def _do_nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook."""


class _Listener(StateManager):
    """The state manager that diffusers tells every `cache_context` of a model."""

    def __init__(self, state: PipelineState | None) -> None:
        super().__init__(BaseState)
        self.state = state

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        if self.state is not None:
            self.state.enter_context(context)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Listener, (None,)


class StepHook(ModelHook):
    """Hears of `cache_context` and of the end of a run; does nothing to the forward."""

    _is_stateful = True

    def __init__(self, state: PipelineState | None) -> None:
        super().__init__()
        self.listener = _Listener(state)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """As the host's."""
        if self.listener.state is not None:
            self.listener.state.restart()
        return module


def add_step_hook(model: nn.Module, state: PipelineState) -> None:
    """Let `state` hear the model's contexts.

    `register_hook` would wrap the model's forward in a closure (compilers, pickle); this hook needs the list only. It
    stands first, where removing any other hook never touches it.
    """
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[_NAME] = StepHook(state)
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, HookFunctionReference())


def remove_step_hook(model: nn.Module) -> None:
    """Undo `add_step_hook`, the registry included when it holds nothing else."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or _NAME not in registry.hooks:
        return
    place = registry._hook_order.index(_NAME)
    del registry.hooks[_NAME], registry._hook_order[place], registry._fn_refs[place]
    if not registry.hooks:
        del model._diffusers_hook
