"""PAROAttention (arXiv 2506.16054): an axis order for each head, static block masks, quantised products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int
from hf_attn.mechanism import Capabilities, DiffusionConfig, Mechanism
from hf_attn.mechanisms._paro_maps import (
    best_orders,
    block_mass,
    distinct_orders,
    forced_blocks,
    keep_blocks,
    order_scores,
    pack_bits,
    paper_score,
    unpack_bits,
)
from hf_attn.mechanisms._paro_plan import Entry, LayerShape, PlanTables, Reordering, make_entry
from hf_attn.ops import block_sparse_attention, dense_attention, quantized_block_attention
from hf_attn.ops.quantized import check_bits
from hf_attn.pattern import BlockPattern

__all__ = [
    "MECHANISM", "LayerShape", "ParoAttentionConfig", "PlanTables", "Reordering", "best_orders", "block_mass",
    "distinct_orders", "forced_blocks", "keep_blocks", "order_scores", "pack_bits", "paper_score", "unpack_bits",
]  # fmt: skip

# The published setting for video; what layers without a plan keep when no density is given.
DEFAULT_DENSITY = 0.3
# Rows that a layer without a plan reads to find its orders and blocks.
_FIRST_CALL_ROWS = 4096


@dataclass
class ParoAttentionConfig(DiffusionConfig):
    """Tokens of each head in its own axis order, then a static block mask; optionally INT8 or INT4 products.

    `density`, `dense_steps`, `min_tokens`, `schedule`, `strict` and `layers` are the common ones; with a plan the
    density is the plan's.

    Args:
        plan: what `hf_attn.calibrate(pipe, "paro")` returns or `hf_attn.load_plan` reads. None: the first sparse call
            of every layer finds orders and blocks on its own queries and keys (at most 4096 rows of them), and keeps
            them for all later steps and runs with this grid: no calibration, but it knows one step of one prompt.
        block_size: queries and keys per block; with a plan the plan's.
        qk_bits, pv_bits: None, 8 or 4; see `ops.quantized_block_attention`. Inference only.
    """

    plan: Any = None
    block_size: int = 64
    qk_bits: int | None = None
    pv_bits: int | None = None

    def __post_init__(self) -> None:
        require_int("block_size", self.block_size, 1)
        check_bits("qk_bits", self.qk_bits)
        check_bits("pv_bits", self.pv_bits)
        self._found: dict[tuple, Entry] = {}
        if self.plan is not None:
            self._use_plan()
        super().__post_init__()

    def _use_plan(self) -> None:
        if not isinstance(self.plan, PlanTables) and not hasattr(self.plan, "tables"):
            raise TypeError(
                f"plan must be a ParoPlan (hf_attn.calibrate, hf_attn.load_plan), got {type(self.plan).__name__}"
            )
        tables = self.tables
        assert tables is not None  # _use_plan runs with a plan only
        default = {f.name: f.default for f in fields(self)}["block_size"]
        if self.block_size not in (default, tables.block_size):
            raise ValueError(f"block_size is {self.block_size}, but the plan was made with {tables.block_size}")
        self.block_size = tables.block_size
        wanted = [self.density] if self.density is not None else []
        wanted += [value for value in self.schedule or [] if value != 1.0]
        for density in wanted:
            if density != tables.density:
                raise ValueError(
                    f"density is {density}, but the plan was made for {tables.density}; calibrate again with this "
                    "density (a schedule may mix the plan's density and 1.0)"
                )

    @property
    def tables(self) -> PlanTables | None:
        """The plan's tensors."""
        if self.plan is None or isinstance(self.plan, PlanTables):
            return self.plan
        return self.plan.tables()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready options; a plan is named by where it came from."""
        options = {name: value for name, value in self._own_options().items() if name != "plan"}
        if self.plan is not None:
            options["plan"] = getattr(self.plan, "source", "") or "in memory"
        return {**options, "layers": dict(self.layers)}


def attend(call: AttentionCall, config: ParoAttentionConfig) -> Tensor:
    """PARO's attention `[B, Hq, N, Dv]`: permute, attend over the kept blocks, permute back."""
    found, reason = _entry(call, config)
    if found is None:
        return dense_attention(call)
    call.layer.record(path="sparse", computed=found.computed, visible=found.visible)
    query, key, value = (found.order.apply(x) for x in (call.query, call.key, call.value))
    return found.order.undo(_attention(query, key, value, call, config, found))


def select(call: AttentionCall, config: ParoAttentionConfig) -> BlockPattern:
    """The kept blocks, in the order of each head; for pictures.

    Raises ValueError for a call that runs dense, with the reason.
    """
    found, reason = _entry(call, config)
    if found is None:
        raise ValueError(f"this call runs dense: {reason}")
    return found.pattern


def attended(call: AttentionCall, config: ParoAttentionConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B, Hq, R, N]`."""
    found, _ = _entry(call, config)
    if found is None:
        return call.tokens.visible(False, call.query.device).expand(-1, call.query.shape[1], -1, -1)[:, :, rows]
    mask = found.pattern.to_token_mask()[..., None].float()
    columns = found.order.undo(mask.flatten(3)).transpose(2, 3)
    mask = found.order.undo(columns).transpose(2, 3)[:, :, rows] > 0
    real = call.tokens.real_keys()
    return mask if real is None else mask & real[:, None, None]


def measured_layer(
    call: AttentionCall, block_size: int, density: float, *, row_sample: float = 1.0, seed: int = 0
) -> tuple[list[int], Tensor]:
    """Axis orders `[H]` and block mask bool `[H, nb, nb]` of one call alone."""
    grid = call.tokens.known_grid()
    orders = distinct_orders(grid)
    with torch.no_grad():
        mass = block_mass(
            call.query, _spread(call.key, call.query), grid, scale=call.scale, block_size=block_size, orders=orders,
            real=call.tokens.real_keys(), row_sample=row_sample, seed=seed,
        )  # fmt: skip
        best = best_orders(mass, grid, block_size, density)
        mine = mass[best, torch.arange(len(best), device=best.device)]
        mask = keep_blocks(mine, forced_blocks(mine, grid, block_size), density)
    return [orders[place] for place in best.tolist()], mask


def _entry(call: AttentionCall, config: ParoAttentionConfig) -> tuple[Entry | None, str | None]:
    """What a call needs, or None and why it runs dense (recorded); raises ValueError for calls that cannot work."""
    if call.causal:
        raise ValueError("paroattention has no causal form: reordered tokens would see the future")
    if call.q_len != call.k_len:
        raise ValueError(f"paroattention needs as many queries as keys, got {call.q_len} and {call.k_len}")
    grid = call.tokens.grid
    if grid is None:
        raise ValueError(
            "paroattention needs the latent grid (call.tokens.grid), got None; it works on diffusers models"
        )
    grid.check_length(call.k_len)
    if call.k_len < config.min_tokens:
        reason = f"fewer than min_tokens={config.min_tokens} tokens"
        call.layer.record(path="dense", reason=reason)
        return None, reason
    layer, heads = call.layer, call.query.shape[1]
    number = layer.number if layer.number is not None else layer.index
    device = call.query.device
    tables = config.tables
    if tables is None:
        density = DEFAULT_DENSITY if config.density is None else config.density
        key = number, layer.head_offset, heads, grid, density, device
        if key not in config._found:
            share = min(_FIRST_CALL_ROWS / call.k_len, 1.0)
            orders, mask = measured_layer(call, config.block_size, density, row_sample=share, seed=number or 0)
            config._found[key] = make_entry(grid, orders, mask, config.block_size, device)
        return config._found[key], None
    problem = tables.problem(
        0 if number is None and len(tables.layers) == 1 else number, grid, heads, layer.head_offset
    )
    if problem is not None:
        if config.strict:
            raise ValueError(problem)
        _warn_once(f"{problem}; such calls run dense (strict=True raises instead)")
        call.layer.record(path="dense", reason=problem, fallback=True)
        return None, problem
    group = tables.group(layer.step, layer.num_steps, layer.timestep)
    return tables.entry(number or 0, group, grid, heads, layer.head_offset, device), None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(f"hf_attn: {message}", stacklevel=4)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, config: ParoAttentionConfig, found: Entry
) -> Tensor:
    """Attention of reordered tensors; padding is hidden as keys and keeps its place in the blocks."""
    key, value = _spread(key, query), _spread(value, query)
    real = call.tokens.real_keys()
    if config.qk_bits is not None or config.pv_bits is not None:
        return quantized_block_attention(
            query, key, value, found.pattern,
            qk_bits=config.qk_bits, pv_bits=config.pv_bits, scale=call.scale, key_mask=real, k_group=64, q_group=32,
        )  # fmt: skip
    if real is None:
        return block_sparse_attention(query, key, value, found.pattern, scale=call.scale)
    bias = torch.zeros(real.shape, device=query.device).masked_fill(~real, float("-inf"))[:, None]
    return block_sparse_attention(query, key, value, found.pattern, scale=call.scale, key_bias=bias)


def _spread(x: Tensor, query: Tensor) -> Tensor:
    """One KV head for every query head."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


MECHANISM = Mechanism(
    name="paroattention",
    summary="an axis order for each head, static block masks, INT8 / INT4; calibrated, for video and image models",
    source="PAROAttention, arXiv 2506.16054",
    config=ParoAttentionConfig,
    capabilities=Capabilities(decode=False, packing=False, triton=True, diffusers=True, latent_grid=True),
    attend=attend,
    select=select,
    attended=attended,
)
