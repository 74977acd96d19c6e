"""Calibration of PAROAttention: dense generations whose attention maps give each head an axis order and block masks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int, require_one_of, require_share
from hf_attn.grid import AXIS_ORDERS
from hf_attn.integrations.diffusers.geometry import site_modules
from hf_attn.integrations.diffusers.model import install, remove, supported_models
from hf_attn.integrations.diffusers.plan import ParoPlan, classes_of, package_version
from hf_attn.mechanism import Mechanism
from hf_attn.mechanisms.paroattention import (
    MECHANISM,
    LayerShape,
    ParoAttentionConfig,
    best_orders,
    block_mass,
    distinct_orders,
    forced_blocks,
    keep_blocks,
    order_scores,
    pack_bits,
    paper_score,
)
from hf_attn.ops import dense_attention

_FILE = "calibration.safetensors"
# A bare model without a pipeline has no steps: all its calls are one.
_ONE_STEP = (0,)


@dataclass(frozen=True)
class Settings:
    """How a plan is made.

    Args:
        density: share of the blocks, in (0, 1].
        block_size: tokens per block.
        order_rule: "mass" (the order whose kept blocks retain most attention) or "paper" (the published score).
        scope: who shares a budget of blocks: "head", "layer", or "model".
        budget: "total" counts forced blocks in the density, "on_top" adds them (the published rule).
        mask_groups: "half_shared" (the first half of the steps have a mask each, the rest share one) or a number.
        epsilon, sigma, alpha: of the rule "paper".
        row_sample: share of the query rows of every map that is read.
        seed: of those rows.
    """

    density: float = 0.3
    block_size: int = 64
    order_rule: str = "mass"
    scope: str = "layer"
    budget: str = "total"
    mask_groups: int | str = "half_shared"
    epsilon: float | str = "auto"
    sigma: float = 0.9
    alpha: float = 0.5
    row_sample: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_share("density", self.density)
        require_int("block_size", self.block_size, 1)
        require_one_of("order_rule", self.order_rule, ("mass", "paper"))
        require_one_of("scope", self.scope, ("head", "layer", "model"))
        require_one_of("budget", self.budget, ("total", "on_top"))
        if isinstance(self.mask_groups, str):
            require_one_of("mask_groups", self.mask_groups, ("half_shared",))
        else:
            require_int("mask_groups", self.mask_groups, 1)
        if self.epsilon != "auto":
            require_share("epsilon", self.epsilon)
        require_share("sigma", self.sigma)
        require_share("row_sample", self.row_sample)

    def groups(self, steps: int) -> list[int]:
        """The mask set of each of `steps` steps."""
        if isinstance(self.mask_groups, str):  # "half_shared"
            return [min(step, steps // 2) for step in range(steps)]
        count = min(self.mask_groups, steps)
        return [step * count // steps for step in range(steps)]


def calibrate_paro(
    target: Any,
    *,
    calls: Sequence[dict[str, Any]] | None = None,
    prompts: Sequence[str] | None = None,
    call: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> ParoPlan:
    """A plan for `target` from the attention maps of dense generations, without training; `target` is left as it was.

    Args:
        target: a diffusers pipeline, or one of its models.
        calls: arguments of each generation (of each forward, for a model). Or, for a pipeline:
        prompts, call: a generation for each prompt with the arguments `call` (size, steps, ...).
        checkpoint: folder for what was measured so far. A calibration that was killed goes on from there, given the
            same arguments, and ends with the same plan; a finished one leaves the folder empty.
        checkpoint_seconds: least time between two writings.
        progress: `(done, total)` attention calls, after each.
        base_model: Hub id of the pipeline, for the plan's record.
        settings: fields of `Settings`: density, block_size, order_rule, scope, budget, mask_groups, epsilon, sigma,
            alpha, row_sample, seed.

    A generation is drawn with `torch.Generator().manual_seed(number)` unless its arguments hold a generator, which then
    must give the same numbers when a calibration is resumed. It takes about as long as a dense generation plus six
    block reductions of every map; memory grows by 24 bytes for each head, mask group and pair of blocks.

    Raises ValueError for bad settings, a target that has a mechanism already, calls of different sizes, or a checkpoint
    of another calibration.
    """
    options = Settings(**settings)
    models = supported_models(target)
    runs = _runs(target, calls, prompts, call or {})
    layers = sum(len(site_modules(model)) for model in models.values())
    maps = _Maps(options, classes_of(models), layers, runs, checkpoint, checkpoint_seconds, progress)
    mechanism = Mechanism(
        name=MECHANISM.name, summary="", source="", config=ParoAttentionConfig, attend=maps.attend,
        capabilities=MECHANISM.capabilities,
    )  # fmt: skip
    install(target, mechanism, ParoAttentionConfig(min_tokens=0, dense_steps=0, strict=True))
    try:
        with torch.no_grad():
            for number, arguments in enumerate(runs):
                maps.begin(number)
                if not isinstance(target, nn.Module) and "generator" not in arguments:
                    arguments = {**arguments, "generator": torch.Generator().manual_seed(number)}
                target(**arguments)
            maps.end()
    finally:
        remove(target)
    return maps.plan(base_model or getattr(target, "name_or_path", None) or None)


def _runs(target: Any, calls: Any, prompts: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    if (calls is None) == (prompts is None):
        raise ValueError("give either calls= (arguments of each generation) or prompts= (and call=)")
    if prompts is not None:
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}")
        calls = [{**call, "prompt": prompt} for prompt in prompts]
    calls = [dict(arguments) for arguments in calls]
    if not calls:
        raise ValueError("calibration needs at least one generation, got none")
    if not isinstance(target, nn.Module):
        calls = [{"output_type": "latent", **arguments} for arguments in calls]
    return calls


class _Maps:
    """What was measured: for every layer and group of steps the block mass in each order, and the paper's scores."""

    def __init__(
        self, options: Settings, classes: str, layers: int, runs, checkpoint, seconds: float, progress
    ) -> None:  # fmt: skip
        self.options, self.classes, self.layers = options, classes, layers
        self.runs, self.progress = len(runs), progress
        self.folder = None if checkpoint is None else Path(checkpoint)
        self.seconds, self.written = seconds, time.monotonic()
        self.shapes: dict[int, LayerShape] = {}
        self.mass: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], int] = {}
        self.scores: dict[int, Tensor] = {}
        self.timesteps: dict[int, float] = {}
        self.steps: int | None = None
        self.run = 0
        # (generation, step): the last one that is complete in what was loaded, and the one that is running.
        self.done = (-1, -1)
        self.now: tuple[int, int] | None = None
        self.sample = 0
        described = repr((options, classes, [_plain(arguments) for arguments in runs]))
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self._load()

    def begin(self, run: int) -> None:
        """A generation starts."""
        self.end()
        self.run, self.now = run, None

    def end(self) -> None:
        """A step, or everything, is over."""
        if self.now is not None and self.now > self.done:
            self.done = self.now
            if self.folder is not None and time.monotonic() - self.written >= self.seconds:
                self._save(self.folder)
        self.sample = 0

    def attend(self, call: AttentionCall, config: ParoAttentionConfig) -> Tensor:
        """Dense attention; the map of a step that is not done yet is measured."""
        step = call.layer.step or 0
        if (self.run, step) != self.now:
            self.end()
            self.now = (self.run, step)
            self.steps = call.layer.num_steps or self.steps
            if call.layer.timestep is not None and self.steps:
                self.timesteps.setdefault(step, float(call.layer.timestep))
        if self.now > self.done:
            self._measure(call, step)
        call.layer.record(path="dense", reason="calibration")
        if self.progress is not None:
            layers, steps = call.layer.count or 1, self.steps or 1
            done = (self.run * steps + step) * layers + (call.layer.index or 0) + 1
            self.progress(min(done, self.runs * steps * layers), self.runs * steps * layers)
        return dense_attention(call)

    def _measure(self, call: AttentionCall, step: int) -> None:
        layer, grid, options = call.layer.number, call.tokens.known_grid(), self.options
        assert layer is not None  # sites of diffusion models are numbered
        self._note_shape(layer, call)
        group = (options.groups(self.steps) if self.steps else _ONE_STEP)[step if self.steps else 0]
        orders = distinct_orders(grid)
        self.sample += 1
        shared: dict[str, Any] = {"scale": call.scale, "block_size": options.block_size}
        shared["real"] = call.tokens.real_keys()
        seed = (options.seed * 1_000_003 + self.run * 10_007 + step) * 1_009 + self.sample
        mass = block_mass(call.query, call.key, grid, orders=orders, row_sample=options.row_sample, seed=seed, **shared)
        if self.shapes[layer].after < 0:
            # Blocks with text are kept anyway, and their number differs from call to call.
            known = grid.lattice.stop // options.block_size
            mass = mass[:, :, :known, :known]
        mass = mass.float().cpu()
        key = layer, group
        if key in self.mass and self.mass[key].shape == mass.shape:
            self.mass[key] += mass
        elif key in self.mass:
            known = min(self.mass[key].shape[-1], mass.shape[-1])
            self.mass[key] = self.mass[key][..., :known, :known] + mass[..., :known, :known]
        else:
            self.mass[key] = mass
        self.counts[key] = self.counts.get(key, 0) + 1
        if options.order_rule == "paper":
            found = order_scores(call.query, call.key, grid, epsilon=options.epsilon, sigma=options.sigma, **shared)
            scores = torch.stack(found).float().cpu()
            self.scores[layer] = self.scores.get(layer, 0) + torch.cat([scores, torch.ones_like(scores[:1])])

    def _note_shape(self, layer: int, call: AttentionCall) -> None:
        """Every call of a layer must have the same lattice; only the text behind it may vary."""
        grid, heads = call.tokens.known_grid(), call.query.shape[1]
        shape = LayerShape(*grid.shape, grid.text_before, grid.text_after, heads)
        known = self.shapes.setdefault(layer, shape)
        if known == shape or known == shape._replace(after=-1):
            return
        if known._replace(after=-1) != shape._replace(after=-1):
            raise ValueError(f"calls of one calibration must have one size: layer {layer} had {known}, now {shape}")
        self.shapes[layer] = shape._replace(after=-1)
        blocks = grid.lattice.stop // self.options.block_size
        for key in self.mass:
            if key[0] == layer:
                self.mass[key] = self.mass[key][..., :blocks, :blocks]

    # -- the plan ----------------------------------------------------------------------------------------------------

    def plan(self, base_model: str | None) -> ParoPlan:
        """Orders, masks, and everything a loader has to check."""
        missing = sorted(set(range(self.layers)) - set(self.shapes))
        if missing:
            raise ValueError(
                f"layers {missing} of {self.layers} were never called (a second transformer serves the last steps); "
                "give more steps, so that a generation reaches every layer"
            )
        groups = self.options.groups(self.steps) if self.steps else list(_ONE_STEP)
        steps = range(len(groups))
        timesteps = [self.timesteps[s] for s in steps] if all(s in self.timesteps for s in steps) else []
        plan = ParoPlan(
            base_model_class=self.classes, layer_shapes=[list(self.shapes[layer]) for layer in sorted(self.shapes)],
            block_size=self.options.block_size, timesteps=timesteps, step_groups=groups, density=self.options.density,
            settings={**vars(self.options), "samples": sum(self.counts.values())}, base_model=base_model,
            version=package_version(),
        )  # fmt: skip
        chosen: dict[int, list[Tensor]] = {}
        for layer in self.shapes:
            orders, places = self._choose(layer, max(groups) + 1)
            plan.order[layer, : len(orders)] = torch.tensor(orders, dtype=torch.uint8)
            heads = torch.arange(len(orders))
            chosen[layer] = [self._mass(layer, group)[places, heads] for group in range(max(groups) + 1)]
        for group in range(max(groups) + 1):
            self._write_masks(plan, group, {layer: maps[group] for layer, maps in chosen.items()})
        self._clear()
        return plan

    def _mass(self, layer: int, group: int) -> Tensor:
        """Mean mass of a group; steps that were never reached take the nearest group that was."""
        known = min((g for la, g in self.mass if la == layer), key=lambda g: abs(g - group))
        return self.mass[layer, known] / self.counts[layer, known]

    def _choose(self, layer: int, groups: int) -> tuple[list[int], Tensor]:
        """Order ids of the heads, and their places among the measured orders."""
        options, shape = self.options, self.shapes[layer]
        grid = self._grid(layer)
        orders = distinct_orders(grid)
        mass = torch.stack([self._mass(layer, group) for group in range(groups)])
        best = best_orders(mass, grid, options.block_size, options.density, budget=options.budget)
        if options.order_rule == "paper" and shape.frames * shape.height * shape.width >= options.block_size:
            sparse, quant, count = self.scores[layer]
            wanted = paper_score(sparse / count, quant / count, options.alpha).argmin(-1)
            names = ["".join(a for a in AXIS_ORDERS[o] if grid.shape["FHW".index(a)] > 1) for o in range(6)]
            best = torch.tensor([[names[o] for o in orders].index(names[w]) for w in wanted.tolist()])
        return [orders[place] for place in best.tolist()], best

    def _grid(self, layer: int) -> Any:
        shape = self.shapes[layer]
        size = shape.frames * shape.height * shape.width + shape.before
        if shape.after >= 0:
            return shape.grid(size + shape.after)
        # Only whole blocks of the lattice are known; nothing of the text behind.
        return shape._replace(after=0).grid(size)

    def _write_masks(self, plan: ParoPlan, group: int, maps: dict[int, Tensor]) -> None:
        options = self.options
        forced = {layer: self._forced(layer, mass) for layer, mass in maps.items()}
        kept: dict[int, Tensor] = {}
        if options.scope == "model" and len({mass.shape[1:] for mass in maps.values()}) == 1:
            sizes = [len(mass) for mass in maps.values()]
            every, always = (torch.cat(list(x.values())) for x in (maps, forced))
            together = keep_blocks(every, always, options.density, budget=options.budget)
            kept = dict(zip(maps, together.split(sizes), strict=True))
        else:
            for layer, mass in maps.items():
                runs = len(mass) if options.scope == "head" else 1
                kept[layer] = keep_blocks(mass, forced[layer], options.density, budget=options.budget, groups=runs)
        for layer, mask in kept.items():
            packed = pack_bits(mask)
            plan.block_mask[group, layer, : len(mask), : mask.shape[1], : packed.shape[-1]] = packed

    def _forced(self, layer: int, mass: Tensor) -> Tensor:
        grid, blocks = self._grid(layer), mass.shape[-1]
        if self.shapes[layer].after >= 0:
            return forced_blocks(mass, grid, self.options.block_size)
        heaviest = torch.zeros_like(mass, dtype=torch.bool)
        return heaviest.scatter_(-1, mass.argmax(-1, keepdim=True), True) if blocks else heaviest

    # -- the checkpoint ----------------------------------------------------------------------------------------------

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"mass.{layer}.{group}": mass.contiguous() for (layer, group), mass in self.mass.items()}
        tensors |= {f"scores.{layer}": scores for layer, scores in self.scores.items()}
        facts = {
            "done": self.done, "steps": self.steps, "shapes": {str(k): list(v) for k, v in self.shapes.items()},
            "counts": [[*key, count] for key, count in self.counts.items()],
            "timesteps": sorted(self.timesteps.items()), "fingerprint": self.fingerprint,
        }  # fmt: skip
        part = folder / f"{_FILE}.part"
        save_file(tensors, part, metadata={"facts": json.dumps(facts)})
        os.replace(part, folder / _FILE)
        self.written = time.monotonic()

    def _load(self) -> None:
        file = None if self.folder is None else self.folder / _FILE
        if file is None or not file.is_file():
            return
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            if facts["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds a calibration with other arguments; give it the same ones, or another folder"
                )
            for name in stored.keys():
                kind, *numbers = name.split(".")
                if kind == "mass":
                    self.mass[int(numbers[0]), int(numbers[1])] = stored.get_tensor(name)
                else:
                    self.scores[int(numbers[0])] = stored.get_tensor(name)
        self.done, self.steps = tuple(facts["done"]), facts["steps"]
        self.shapes = {int(key): LayerShape(*value) for key, value in facts["shapes"].items()}
        self.counts = {(layer, group): count for layer, group, count in facts["counts"]}
        self.timesteps = {step: value for step, value in facts["timesteps"]}

    def _clear(self) -> None:
        if self.folder is not None and (self.folder / _FILE).is_file():
            (self.folder / _FILE).unlink()


def _plain(value: Any) -> Any:
    """Arguments as something whose repr says all of it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
