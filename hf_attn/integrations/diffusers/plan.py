"""Calibrated plans on disk and on the Hub: a folder like that of a diffusers model, holding tensors only."""

from __future__ import annotations

import importlib.metadata
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hf_attn.integrations.diffusers.geometry import site_modules
from hf_attn.mechanisms.paroattention import LayerShape, PlanTables

# Where a plan lies inside a pipeline's repository; pipelines ignore folders that they do not know.
SUBFOLDER = "sparse_attention"


class ParoPlan(ModelMixin, ConfigMixin):
    """A plan of PAROAttention: axis orders and block masks of every head, as uint8 buffers.

    It saves, loads and pushes like a diffusers model. Buffers: `order` `[layers, heads]`, the axis order of each head
    (`hf_attn.grid.AXIS_ORDERS`); `block_mask` `[groups, layers, heads, nb, ceil(nb / 8)]`, bits with the little end
    first.

    Args:
        base_model_class: classes of the calibrated models, joined by "+".
        layer_shapes: per layer [frames, height, width, text before, text after (-1 = any), heads].
        block_size: tokens per block.
        timesteps: the scheduler's value at each calibrated step, empty when unknown.
        step_groups: mask set of each calibrated step.
        density: share of the blocks that was asked for.
        settings: how it was calibrated (order rule, epsilon, ...), for the record.
        base_model: Hub id of the pipeline.
        version: of this package.

    Raises ValueError for values that contradict each other.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        base_model_class: str,
        layer_shapes: list[list[int]],
        block_size: int,
        timesteps: list[float],
        step_groups: list[int],
        density: float,
        settings: dict[str, Any] | None = None,
        base_model: str | None = None,
        version: str | None = None,
    ) -> None:
        super().__init__()
        if not layer_shapes or any(len(shape) != 6 for shape in layer_shapes):
            raise ValueError(f"layer_shapes must hold six numbers a layer, got {layer_shapes!r}")
        if not step_groups or timesteps and len(timesteps) != len(step_groups):
            raise ValueError(f"step_groups and timesteps differ: {len(step_groups)} and {len(timesteps)} steps")
        shapes = [LayerShape(*shape) for shape in layer_shapes]
        heads = max(shape.heads for shape in shapes)
        blocks = max(-(-shape.grid(_stored_length(shape)).length // block_size) for shape in shapes)
        groups = max(step_groups) + 1
        self.register_buffer("order", torch.zeros(len(shapes), heads, dtype=torch.uint8))
        mask = torch.zeros(groups, len(shapes), heads, blocks, -(-blocks // 8), dtype=torch.uint8)
        self.register_buffer("block_mask", mask)
        self._tables: PlanTables | None = None
        self.source = ""

    def tables(self) -> PlanTables:
        """The plan as the mechanism reads it; on the CPU, wherever the buffers are."""
        if self._tables is None:
            config = self.config
            self._tables = PlanTables(
                self.order.cpu(), self.block_mask.cpu(), config.block_size,
                tuple(LayerShape(*shape) for shape in config.layer_shapes), tuple(config.timesteps),
                tuple(config.step_groups), config.density,
            )  # fmt: skip
        return self._tables

    def __deepcopy__(self, memo: dict[int, Any]) -> ParoPlan:
        # Nothing in it changes, and options that hold it are copied.
        return self


def _stored_length(shape: LayerShape) -> int:
    return shape.frames * shape.height * shape.width + shape.before + max(shape.after, 0)


def package_version() -> str | None:
    """The installed version of this package."""
    try:
        return importlib.metadata.version("hf-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_plan(plan: Any, models: dict[str, nn.Module]) -> None:
    """Raise ValueError unless `plan` (a ParoPlan, tables alone or None) was made for models like these."""
    if not isinstance(plan, ParoPlan):
        return
    classes = classes_of(models)
    if plan.config.base_model_class != classes:
        raise ValueError(f"the plan was made for {plan.config.base_model_class}, but this is {classes}")
    layers = sum(len(site_modules(model)) for model in models.values())
    if len(plan.config.layer_shapes) != layers:
        raise ValueError(
            f"the plan has {len(plan.config.layer_shapes)} layers, but {classes} has {layers} here; a plan fits one "
            "size of a model"
        )
    modules = (module for model in models.values() for module in site_modules(model).values())
    for number, (module, shape) in enumerate(zip(modules, plan.config.layer_shapes, strict=True)):
        heads = getattr(module, "heads", shape[5])
        if heads != shape[5]:
            raise ValueError(f"the plan has {shape[5]} heads in layer {number}, but {classes} has {heads} there")


def classes_of(models: dict[str, nn.Module]) -> str:
    """Names of the models' classes as a plan has them."""
    return "+".join(type(model).__name__ for model in models.values())


def load_plan(target: Any, path_or_repo: str | PathLike, *, options: dict[str, Any], **loading: Any) -> ParoPlan:
    """See `hf_attn.load_plan`."""
    from hf_attn.integrations.diffusers.model import apply

    plan = read_plan(path_or_repo, **loading)
    apply(target, "paroattention", plan=plan, **options)
    return plan


def read_plan(path_or_repo: str | PathLike, **loading: Any) -> ParoPlan:
    """A plan of a folder or Hub repository, whether it is the plan alone or a pipeline with a plan in it."""
    folder = Path(path_or_repo)
    if folder.is_dir() and "subfolder" not in loading:
        if not (folder / "config.json").is_file() and (folder / SUBFOLDER / "config.json").is_file():
            loading["subfolder"] = SUBFOLDER
        config = folder / loading.get("subfolder", "") / "config.json"
        if not config.is_file():
            raise ValueError(f"{folder} holds no plan: neither config.json nor {SUBFOLDER}/config.json is there")
        name = json.loads(config.read_text()).get("_class_name")
        if name != "ParoPlan":
            raise ValueError(f"{folder} holds a {name}, not a ParoPlan; write one with hf_attn.save_plan")
    plan = ParoPlan.from_pretrained(str(path_or_repo), **loading)
    plan.source = str(path_or_repo)
    return plan


def save_plan(target: Any, path: str | PathLike, *, push_to_hub: bool = False, **options: Any) -> None:
    """See `hf_attn.save_plan`."""
    from hf_attn.integrations.diffusers.model import installed_in

    plan = target
    if not isinstance(target, ParoPlan):
        installed = installed_in(target)
        plan = next((getattr(root.state.config, "plan", None) for _, root in installed.values()), None)
        if not isinstance(plan, ParoPlan):
            what = "no mechanism" if not installed else "a mechanism without a plan"
            raise ValueError(
                f"{type(target).__name__} has {what}, so there is nothing to save; make a plan with "
                "hf_attn.calibrate(pipe, 'paro', ...) and apply it"
            )
    plan.save_pretrained(str(path), push_to_hub=push_to_hub, **options)


ParoPlan.__module__ = "hf_attn"
