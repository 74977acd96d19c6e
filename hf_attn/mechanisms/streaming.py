"""Sinks and a sliding window (StreamingLLM, arXiv 2309.17453), at block granularity: the smallest mechanism file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.ops import block_sparse_attention, routed_block_attention
from hf_attn.pattern import BlockPattern


@dataclass
class StreamingConfig(MechanismConfig):
    """Attend to the first tokens and the most recent ones, counted in whole key blocks.

    Args:
        num_sinks: first tokens every query sees, >= 0, rounded up to whole blocks.
        window: most recent tokens a query sees, >= 1, rounded up to whole blocks; its own block counts as one.
        block_size: tokens per block, >= 1.
    """

    num_sinks: int = 4
    window: int = 1024
    block_size: int = 128

    def __post_init__(self) -> None:
        require_int("num_sinks", self.num_sinks, 0)
        require_int("window", self.window, 1)
        require_int("block_size", self.block_size, 1)
        super().__post_init__()

    @property
    def sink_blocks(self) -> int:
        return -(-self.num_sinks // self.block_size)

    @property
    def window_blocks(self) -> int:
        return -(-self.window // self.block_size)


def attend(call: AttentionCall, config: StreamingConfig) -> Tensor:
    """Query of block p reads key blocks [0, sinks) and (p - window, p], causally. `[B, Hq, Nq, Dv]`.

    Raises ValueError for layers that are not causal.
    """
    if not call.causal:
        raise ValueError(
            "streaming needs causal attention, but this module is not causal; leave the layer dense with "
            "layers={index: None} or use another mechanism"
        )
    if call.layer.recording:
        computed, visible = _pairs(call, config)
        call.layer.record(path="sparse", computed=computed, visible=visible)
    options: dict[str, Any] = {"causal": True, "scale": call.scale, "tokens": call.tokens}
    if call.q_len == call.k_len:
        return block_sparse_attention(call.query, call.key, call.value, select(call, config), **options)
    # Behind a cache, query blocks no longer start at block borders: say it per query token.
    routes = _routes(call, config)
    return routed_block_attention(call.query, call.key, call.value, routes, block_size=config.block_size, **options)


def select(call: AttentionCall, config: StreamingConfig) -> BlockPattern:
    """The pattern of a whole sequence, listed by arithmetic so that a compiler can follow any length."""
    size = {"block_q": config.block_size, "block_k": config.block_size, "q_len": call.q_len, "k_len": call.k_len}
    device, offset = call.query.device, call.k_len - call.q_len
    num_q, num_k = (-(-length // config.block_size) for length in (call.q_len, call.k_len))
    first = torch.arange(num_q, device=device)[:, None] * config.block_size + offset
    last = (first + config.block_size - 1).clamp(max=call.k_len - 1).div(config.block_size, rounding_mode="floor")
    lowest = first.div(config.block_size, rounding_mode="floor") - config.window_blocks + 1
    # Behind a cache the queries of one block may lie in two key blocks.
    width = config.window_blocks + (offset % config.block_size > 0)
    recent = last - torch.arange(torch.sym_min(width, num_k), device=device)
    recent = torch.where(recent >= lowest, recent, -1)
    listed = _with_sinks(recent, lowest, config)
    listed = torch.where(listed < 0, num_k, listed).sort(-1).values
    return BlockPattern(torch.where(listed == num_k, -1, listed)[None, None].to(torch.int32), **size)


def attended(call: AttentionCall, config: StreamingConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B | 1, 1, R, Nk]`; for rows without padding."""
    own = (rows + call.k_len - call.q_len)[:, None]
    key = torch.arange(call.k_len, device=rows.device)
    block, own_block = key // config.block_size, own // config.block_size
    near = block > own_block - config.window_blocks
    return ((near | (block < config.sink_blocks)) & (key <= own))[None, None]


def describe(config: StreamingConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """Density of a prefill of these lengths."""
    computed, visible = _count(torch.arange(k_len - q_len, k_len), config)
    return {"density": float(computed) / max(float(visible), 1.0)}


def _routes(call: AttentionCall, config: StreamingConfig) -> Tensor:
    """The same per query token, int32 `[B, Hq, Nq, window + sink blocks]`, -1 padded."""
    own = call.tokens.query_ranks(call.query.device).div(config.block_size, rounding_mode="floor")[..., None]
    width = torch.sym_min(config.window_blocks, -(-call.k_len // config.block_size))
    recent = own - torch.arange(width, device=own.device)
    routes = _with_sinks(recent, own - config.window_blocks + 1, config).clamp(min=-1).to(torch.int32)
    batch, heads = call.query.shape[:2]
    return routes[:, None].expand(batch, heads, -1, -1)


def _with_sinks(recent: Tensor, lowest: Tensor, config: StreamingConfig) -> Tensor:
    """Block ids `[..., n]` of the window and those of the sinks before it; unused places are negative."""
    sinks = torch.arange(config.sink_blocks, device=recent.device).expand(*recent.shape[:-1], -1)
    return torch.cat([recent, torch.where(sinks < lowest, sinks, -1)], -1)


def _pairs(call: AttentionCall, config: StreamingConfig) -> tuple[Tensor, Tensor]:
    ranks = call.tokens.query_ranks(call.query.device)
    rows = call.query.shape[0] // ranks.shape[0] * call.query.shape[1]
    computed, visible = _count(ranks, config)
    return computed * rows, visible * rows


def _count(ranks: Tensor, config: StreamingConfig) -> tuple[Tensor, Tensor]:
    """(query, key) pairs read and causally visible, for queries of these ranks."""
    ranks = ranks[ranks >= 0]
    own = ranks // config.block_size
    recent = own.clamp(max=config.window_blocks - 1)
    sinks = (own - recent).clamp(max=config.sink_blocks)
    computed = (ranks % config.block_size + 1 + (recent + sinks) * config.block_size).sum(dtype=torch.float64)
    return computed, (ranks + 1).sum(dtype=torch.float64)


MECHANISM = Mechanism(
    name="streaming",
    summary="first tokens and a sliding window, in blocks; training-free",
    source="StreamingLLM, arXiv 2309.17453",
    config=StreamingConfig,
    capabilities=Capabilities(bidirectional=False, triton=True),
    attend=attend,
    select=select,
    attended=attended,
    describe=describe,
)
