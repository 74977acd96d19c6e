"""Pyramid Sparse Attention (arXiv 2512.04025): key blocks at full resolution, pooled by 2, 4 or 8, or skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import did_you_mean, require_int, require_one_of
from hf_attn.grid import Permutation, TokenGrid, hilbert_permutation
from hf_attn.mechanism import Capabilities, DiffusionConfig, Mechanism
from hf_attn.ops import dense_attention, pyramid_attention, pyramid_pairs, select_levels
from hf_attn.ops.pyramid import check_blocks, check_rule, check_similarity
from hf_attn.pattern import BlockPattern

# Bounds of levels 1, 2, 4, 8 when none are given, by mode.
BOUNDS = {
    "threshold": (0.5, 0.6, 0.7, 0.8),
    "quantile": (0.10, 0.15, 0.15, 0.35),
    "energybound": (0.7, 0.8, 0.9, 0.9),
}
# With a density to meet only their ratios count; a last bound of 1 sees every block, at least pooled, where that fits.
DENSITY_BOUNDS = {**BOUNDS, "threshold": (0.15, 0.3, 0.6, 1.0)}
# What layers that are not causal are fitted to when neither density nor bounds are given.
DEFAULT_DENSITY = 0.25
PREFILL_SIMILARITY = (0.75, 0.70, 0.70)
# Far enough apart that layers, steps and heads never share a seed.
_SEED_OF_LAYER, _SEED_OF_STEP = 15_485_863, 32_452_843

_WAN = {"block_size": 128, "mode": "threshold", "reorder": "hilbert", "similarity": None}
PRESETS: dict[str, dict[str, Any]] = {
    "library": {"block_k": 64, "mode": "quantile", "bounds": BOUNDS["quantile"], "reorder": "none", "dense_steps": 0},
    "wan2.1-14b": {**_WAN, "bounds": (0.4, 0.5, 0.6, 0.8), "dense_steps": 0.3},
    "wan2.1-1.3b": {**_WAN, "bounds": (0.5, 0.6, 0.7, 0.8), "similarity": (0.7, 0.65, 0.6), "dense_steps": 0.3},
    "wan2.1-1.3b-topk": {
        **_WAN, "block_k": 32, "mode": "quantile", "bounds": (0.05, 0.10, 0.15, 0.25), "dense_steps": 0.3,
    },
    "wan2.2-a14b": {**_WAN, "block_k": 32, "bounds": (0.5, 0.6, 0.6, 0.8), "dense_steps": 0.3},
    "wan2.2-5b": {**_WAN, "block_k": 32, "bounds": (0.6, 0.7, 0.7, 0.8), "dense_steps": 0.3},
    "cogvideox-5b": {"mode": "quantile", "bounds": (0.10, 0.15, 0.15, 0.35), "reorder": "none", "dense_steps": 0.3},
    "cogvideox1.5-5b": {
        "block_k": 32, "mode": "quantile", "bounds": (0.10, 0.15, 0.15, 0.35), "reorder": "hilbert", "dense_steps": 0.3,
    },
    "cogvideox-5b-4steps": {
        "mode": "quantile", "bounds": (0.05, 0.15, 0.25, 0.50), "reorder": "none", "dense_steps": 0,
    },
    "qwen2.5-vl": {
        "mode": "energybound", "bounds": (0.7, 0.8, 0.9, 0.9), "stride": 8, "reorder": "none", "text_length": 512,
        "similarity": PREFILL_SIMILARITY,
    },
}  # fmt: skip
# Parts of the Hub ids of models and the preset that was published for them; the first match counts.
PRESET_MODELS = (
    ("wan2.1-t2v-1.3b", "wan2.1-1.3b"),
    ("wan2.1-t2v-14b", "wan2.1-14b"),
    ("wan2.2-t2v-a14b", "wan2.2-a14b"),
    ("wan2.2-ti2v-5b", "wan2.2-5b"),
    ("cogvideox1.5-5b", "cogvideox1.5-5b"),
    ("cogvideox-5b", "cogvideox-5b"),
)


@dataclass
class PSAConfig(DiffusionConfig):
    """Every (query block, key block) pair reads its keys in full, mean-pooled by 2, 4 or 8, or not at all.

    `preset=` of `from_dict` and `hf_attn.apply` fills in the published settings of a model (`PRESETS`); options named
    beside it win. For a pipeline `preset="auto"` takes the one of its Hub id (`PRESET_MODELS`). `density`,
    `dense_steps`, `min_tokens`, `schedule`, `strict` and `layers` are the common ones.

    Args:
        block_size: queries, and keys, per block; a multiple of 8 unless `block_k` is given.
        block_k: keys per block when it differs, a multiple of 8. Causal layers need it equal.
        mode: how importance becomes levels, "threshold", "quantile" or "energybound" (see `ops.assign_levels`). `None`
            is "threshold", in causal layers "energybound".
        bounds: four rising numbers in [0, 1] for levels 1, 2, 4, 8; `None` takes `BOUNDS[mode]`. With `density` they
            are scaled by a common factor until the density is met, and `None` takes `DENSITY_BOUNDS[mode]`. Layers
            that are not causal are fitted to `DEFAULT_DENSITY` when neither is given.
        min_full: share of the blocks of a row that "threshold" keeps at level 1 at least.
        align_divisor: see `ops.assign_levels`; 0 = off.
        estimator, reduce: of the sampled importance, "softmax" or "rowmax", "max" or "mean".
        seed: of the sampled tokens; layer and denoising step are mixed in.
        similarity: three numbers in [-1, 1] that limit levels 2, 4, 8 (see `ops.similarity_cap`); `None` is off,
            "auto" is off except in causal layers.
        tail: "replicate" or "exact" pooling of the partial last block.
        reorder: "hilbert" walks the latent grid along a Hilbert curve, "none" keeps the order; `None` is "hilbert"
            where there is a grid.
        stride: tokens per group of the causal importance, divides the block.
        text_length: last tokens of a causal prompt that stay at full resolution. (On a grid, text always does.)
    """

    block_size: int = 128
    block_k: int | None = None
    mode: str | None = None
    bounds: Sequence[float] | None = None
    min_full: float = 0.06
    align_divisor: int = 0
    estimator: str = "softmax"
    reduce: str = "max"
    seed: int = 0
    similarity: Sequence[float] | str | None = "auto"
    tail: str = "replicate"
    reorder: str | None = None
    stride: int = 8
    text_length: int = 512

    def __post_init__(self) -> None:
        check_blocks(self.block_size, self.keys_per_block)
        if self.mode is not None:
            require_one_of("mode", self.mode, tuple(BOUNDS))
        if self.bounds is not None:
            self.bounds = list(self.bounds)
        check_rule(*self.rule(causal=False)[:2], self.min_full, self.align_divisor)
        require_one_of("estimator", self.estimator, ("softmax", "rowmax"))
        require_one_of("reduce", self.reduce, ("max", "mean"))
        require_int("seed", self.seed, 0)
        if isinstance(self.similarity, str):
            require_one_of("similarity", self.similarity, ("auto",))
        elif self.similarity is not None:
            self.similarity = check_similarity(self.similarity)
        require_one_of("tail", self.tail, ("replicate", "exact"))
        if self.reorder is not None:
            require_one_of("reorder", self.reorder, ("hilbert", "none"))
        require_int("stride", self.stride, 1)
        require_int("text_length", self.text_length, 0)
        super().__post_init__()
        for key, options in self.layers.items():
            if options and "preset" in options:
                raise ValueError(f"layers[{key!r}] must not hold 'preset'; name it at the top level")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> PSAConfig:
        """Build and check; `preset` is looked up in `PRESETS`.

        Raises ValueError for unknown options and presets.
        """
        if "preset" in options:
            name = options["preset"]
            if name not in PRESETS:
                hint = did_you_mean(str(name), list(PRESETS))
                raise ValueError(f"unknown preset {name!r}{hint}. Presets: {', '.join(PRESETS)}.")
            options = {**PRESETS[name], **{key: value for key, value in options.items() if key != "preset"}}
        return super().from_dict(options)

    @classmethod
    def preset_for(cls, model_id: str) -> str | None:
        """Name of the setting published for a model on the Hub, None when there is none."""
        name = model_id.lower()
        return next((preset for part, preset in PRESET_MODELS if part in name and "-i2v" not in name), None)

    @property
    def fitted_density(self) -> float | None:
        return self.rule(causal=False)[2]

    @property
    def keys_per_block(self) -> int:
        return self.block_size if self.block_k is None else self.block_k

    def rule(self, causal: bool) -> tuple[str, Sequence[float], float | None]:
        """Mode, bounds, and the density that the bounds are fitted to."""
        mode = self.mode or ("energybound" if causal else "threshold")
        density = self.density
        if density is None and self.bounds is None and not causal:
            density = DEFAULT_DENSITY
        if self.bounds is not None:
            return mode, self.bounds, density
        return mode, (BOUNDS if density is None else DENSITY_BOUNDS)[mode], density


def attend(call: AttentionCall, config: PSAConfig) -> Tensor:
    """PSA's attention `[B, Hq, Nq, Dv]`: choose a level for every pair of blocks, then one softmax over all pools.

    Raises ValueError for a schedule in a causal layer, which has no denoising steps.
    """
    if call.causal and config.schedule is not None:
        raise ValueError("schedule needs denoising steps, but this layer is causal; use density=")
    order = _order(call, config)
    reason = _dense_reason(call, config)
    if reason is not None:
        call.layer.record(path="dense", reason=reason)
        return dense_attention(call)
    call = _reordered(call, order)
    levels = choose_levels(call, config, order)
    size: dict[str, Any] = {"block_q": config.block_size, "block_k": config.keys_per_block, "tokens": call.tokens}
    if call.layer.recording:
        computed, visible = pyramid_pairs(levels, causal=call.causal, **size)
        call.layer.record(path="sparse", computed=computed, visible=visible)
    out = pyramid_attention(
        call.query,
        call.key,
        call.value,
        levels,
        causal=call.causal,
        scale=call.scale,
        tail=config.tail,
        **size,
    )
    return out if order is None else order.undo(out)


def choose_levels(call: AttentionCall, config: PSAConfig, order: Permutation | None = None) -> Tensor:
    """Levels uint8 `[B | sequences, Hq, nq, nk]` of a call whose tokens are in the order in which they are cut."""
    mode, bounds, density = config.rule(call.causal)
    similarity = config.similarity
    if isinstance(similarity, str):  # "auto"
        similarity = PREFILL_SIMILARITY if call.causal else None
    layer = call.layer
    return select_levels(
        call.query,
        call.key,
        block_q=config.block_size,
        block_k=config.keys_per_block,
        mode=mode,
        bounds=bounds,
        causal=call.causal,
        scale=call.scale,
        estimator=config.estimator,
        reduce=config.reduce,
        stride=config.stride,
        seed=config.seed + _SEED_OF_LAYER * ((layer.index or 0) + 1) + _SEED_OF_STEP * ((layer.step or 0) + 1),
        first_head=layer.head_offset,
        min_full=config.min_full,
        align_divisor=config.align_divisor,
        similarity=similarity,
        density=density,
        text_spans=_text_spans(call.tokens.grid, order),
        last_text_tokens=config.text_length if call.causal else 0,
        tokens=call.tokens,
    )


def select(call: AttentionCall, config: PSAConfig) -> BlockPattern:
    """Blocks that are read at any level, in the order in which tokens are cut (along the curve); for pictures."""
    order = _order(call, config)
    levels = choose_levels(_reordered(call, order), config, order)
    size: dict[str, Any] = {
        "block_q": config.block_size,
        "block_k": config.keys_per_block,
        "q_len": call.q_len,
        "k_len": call.k_len,
    }
    return BlockPattern.from_dense(levels > 0, **size)


def attended(call: AttentionCall, config: PSAConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, alone or in a pool, bool `[B, Hq, R, Nk]`; rows without padding."""
    order = _order(call, config)
    levels = choose_levels(_reordered(call, order), config, order)
    place = rows if order is None else order.inverse.to(rows.device)[rows]
    read = levels[:, :, place // config.block_size] > 0
    keys = read.repeat_interleave(config.keys_per_block, 3)[..., : call.k_len]
    if call.causal:
        return keys & (torch.arange(call.k_len, device=rows.device) <= rows[:, None])
    return keys if order is None else order.undo(keys, -1)


def describe(config: PSAConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """What a causal prefill of these lengths would do."""
    return {
        "density": config.density,
        "density follows": "the option density" if config.density is not None else "the input",
        "min_tokens": config.min_tokens,
        "dense": k_len < config.min_tokens or q_len < k_len,
        "decode": "dense",
    }


def _dense_reason(call: AttentionCall, config: PSAConfig) -> str | None:
    """Why this call stays dense, or None."""
    if call.q_len != call.k_len:
        return "queries behind a cache: only whole prompts are scored"
    if call.k_len < config.min_tokens:
        return f"fewer than min_tokens={config.min_tokens} tokens"
    return None


def _order(call: AttentionCall, config: PSAConfig) -> Permutation | None:
    """The order in which tokens are cut into blocks, None = as they are; raises ValueError when there is none."""
    grid = call.tokens.grid
    if config.reorder == "hilbert":
        if call.causal:
            raise ValueError("reorder='hilbert' would let tokens see the future: causal layers need reorder='none'")
        if grid is None:
            raise ValueError("reorder='hilbert' needs the latent grid (call.tokens.grid), got None; use reorder='none'")
    if grid is None or call.causal:
        return None
    grid.check_length(call.k_len)
    if config.reorder == "none":
        # Padded text shifts what lies behind it, so it goes last; otherwise nothing has to move.
        moved = call.tokens.index is not None and grid.text_before > 0
        return _text_last(grid) if moved else None
    return hilbert_permutation(grid, text="last")


def _text_last(grid: TokenGrid) -> Permutation:
    places = torch.arange(grid.length)
    before, after = places[: grid.text_before], places[grid.lattice.stop :]
    return Permutation.of(torch.cat([places[grid.lattice], before, after]))


def _reordered(call: AttentionCall, order: Permutation | None) -> AttentionCall:
    """The call with its tokens in another order; positions then count along it."""
    if order is None:
        return call
    query, key, value = (order.apply(x) for x in (call.query, call.key, call.value))
    tokens = call.tokens
    if tokens.index is not None:
        segments = order.apply(tokens.index[:, 0].unflatten(1, (2, -1)), -1).flatten(1)
        positions = torch.arange(call.k_len, device=segments.device, dtype=segments.dtype).repeat(2)
        tokens = replace(tokens, index=torch.stack([segments, positions.expand_as(segments)], 1))
    return replace(call, query=query, key=key, value=value, tokens=tokens)


def _text_spans(grid: TokenGrid | None, order: Permutation | None) -> list[tuple[int, int]]:
    """Where text lies after reordering."""
    if grid is None or not grid.text:
        return []
    if order is not None:
        return [(grid.tokens, grid.length)]
    return [(0, grid.text_before), (grid.lattice.stop, grid.length)]


MECHANISM = Mechanism(
    name="psa",
    summary="key blocks in full, pooled by 2, 4, 8, or skipped; training-free for video models and long prompts",
    source="PSA, arXiv 2512.04025",
    config=PSAConfig,
    capabilities=Capabilities(triton=True, diffusers=True),
    attend=attend,
    select=select,
    attended=attended,
    describe=describe,
)
