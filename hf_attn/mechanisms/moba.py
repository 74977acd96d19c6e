"""Mixture of Block Attention: MoBA (arXiv 2502.13189) and FlashMoBA (arXiv 2511.11571)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import require_int, require_one_of
from hf_attn.mechanism import Capabilities, Mechanism, MechanismConfig
from hf_attn.ops import dense_attention, routed_block_attention, select_routes
from hf_attn.ops.backend import may_go_dense
from hf_attn.pattern import BlockPattern


@dataclass
class MobaConfig(MechanismConfig):
    """Every query attends to its own key block and to the past blocks whose mean key it matches best.

    Args:
        block_size: keys per block (B of the paper), >= 1.
        top_k: blocks per query (k), its own block included, >= 1. `top_k * block_size` is the token budget.
        decode: what a single new token attends to behind a cache: "full", everything (as the original MoBA does), or
            "moba", its `top_k` blocks. Several new tokens at once (chunks of a prompt, but also the candidates of
            assisted decoding and prompt lookup) are always routed; use "moba" where those modes must agree.
        min_seq_len: number of keys below which attention stays dense, >= 0. `None` takes the measured default of
            `default_min_seq_len`; it does not apply when HF_ATTN_BACKEND forces a path.
    """

    block_size: int = 128
    top_k: int = 8
    decode: str = "full"
    min_seq_len: int | None = None

    aliases = {"min_tokens": "min_seq_len"}

    def __post_init__(self) -> None:
        require_int("block_size", self.block_size, 1)
        require_int("top_k", self.top_k, 1)
        require_one_of("decode", self.decode, ("full", "moba"))
        if self.min_seq_len is not None:
            require_int("min_seq_len", self.min_seq_len, 0)
        super().__post_init__()


def default_min_seq_len(config: MobaConfig) -> int:
    """Keys below which dense attention is measured to be as fast as MoBA with these options.

    A fit to the crossovers on the CPU, in token budgets `top_k * block_size`: 2.8 at block 256, 3.4 at 128, 4.9 at 64,
    10 at 32 (docs/moba.md): small blocks cost more to route and to gather.
    """
    budgets = 2.4 + (128 / config.block_size) ** 1.4
    return round(budgets * config.top_k * config.block_size)


def attend(call: AttentionCall, config: MobaConfig) -> Tensor:
    """MoBA's attention `[B, Hq, Nq, Dv]` (moba.md 2.1 to 2.4): route, then one softmax over the chosen blocks."""
    _refuse(call, config)
    reason = _dense_reason(call, config)
    if reason is not None:
        call.layer.record(path="dense", reason=reason)
        return dense_attention(call)
    if call.layer.recording:
        computed, visible = _pairs(call, config)
        call.layer.record(path="sparse", computed=computed, visible=visible)
    return routed_block_attention(
        call.query,
        call.key,
        call.value,
        routes(call, config),
        block_size=config.block_size,
        causal=call.causal,
        scale=call.scale,
        tokens=call.tokens,
    )


def routes(call: AttentionCall, config: MobaConfig) -> Tensor:
    """Blocks each query attends to, int32 `[B, Hq, Nq, min(top_k, n)]`, -1 padded."""
    return select_routes(
        call.query,
        call.key,
        block_size=config.block_size,
        top_k=config.top_k,
        causal=call.causal,
        tokens=call.tokens,
    )


def select(call: AttentionCall, config: MobaConfig) -> BlockPattern:
    """Blocks that at least one query of a query block chose, for pictures; rows without padding."""
    chosen = routes(call, config)
    batch, heads, q_len, width = chosen.shape
    num_q, num_k = -(-q_len // config.block_size), -(-call.k_len // config.block_size)
    query_block = torch.arange(q_len, device=chosen.device)[:, None].expand(-1, width) // config.block_size
    flat = query_block * (num_k + 1) + torch.where(chosen < 0, num_k, chosen)
    mask = torch.zeros(batch, heads, num_q * (num_k + 1), dtype=torch.bool, device=chosen.device)
    mask.scatter_(2, flat.reshape(batch, heads, -1), True)
    mask = mask.view(batch, heads, num_q, num_k + 1)[..., :num_k]
    size = {"block_q": config.block_size, "block_k": config.block_size, "q_len": q_len, "k_len": call.k_len}
    return BlockPattern.from_dense(mask, **size)


def attended(call: AttentionCall, config: MobaConfig, rows: Tensor) -> Tensor:
    """Keys that the given query rows read, bool `[B, Hq, R, Nk]`; rows without padding."""
    chosen = routes(call, config)[:, :, rows]
    num_k = -(-call.k_len // config.block_size)
    blocks = torch.zeros(*chosen.shape[:3], num_k + 1, dtype=torch.bool, device=chosen.device)
    blocks.scatter_(3, torch.where(chosen < 0, num_k, chosen).long(), True)
    keys = blocks[..., :num_k].repeat_interleave(config.block_size, 3)[..., : call.k_len]
    if call.causal:
        position = (rows + call.k_len - call.q_len)[:, None]
        keys = keys & (torch.arange(call.k_len, device=rows.device) <= position)
    return keys


def describe(config: MobaConfig, q_len: int, k_len: int) -> dict[str, Any]:
    """What a causal prefill of these lengths would do: density, and the length below which it stays dense."""
    computed, visible = _count(torch.arange(k_len - q_len, k_len), config)
    threshold = default_min_seq_len(config) if config.min_seq_len is None else config.min_seq_len
    measured = " (measured default)" if config.min_seq_len is None else ""
    return {
        "density": float(computed) / max(float(visible), 1.0),
        "min_seq_len": f"{threshold}{measured}",
        "dense": k_len < threshold,
        "decode": config.decode,
    }


def _refuse(call: AttentionCall, config: MobaConfig) -> None:
    if not call.causal and config.decode == "moba":
        raise ValueError(
            "decode='moba' needs causal attention, but this module is not causal; use decode='full', or leave the "
            "layer dense with layers={index: None}"
        )


def _dense_reason(call: AttentionCall, config: MobaConfig) -> str | None:
    """Why this call stays dense, or None."""
    if config.decode == "full" and call.q_len == 1 and call.k_len > 1:
        return "decode='full': one new token attends to everything"
    if config.min_seq_len is not None and call.k_len < config.min_seq_len:
        return f"fewer than min_seq_len={config.min_seq_len} keys"
    if not may_go_dense():
        return None
    if call.causal and call.k_len <= config.top_k * config.block_size:
        return f"top_k={config.top_k} blocks of {config.block_size} hold every key"
    if config.min_seq_len is not None:
        return None
    threshold = default_min_seq_len(config)
    if call.k_len < threshold:
        return f"fewer keys than the measured min_seq_len={threshold}"
    return None


def _pairs(call: AttentionCall, config: MobaConfig) -> tuple[Tensor, Tensor]:
    """(query, key) pairs computed and visible in this call, over batch rows and query heads."""
    batch, heads = call.query.shape[:2]
    if not call.causal:
        num_k = -(-call.k_len // config.block_size)
        visible = torch.tensor(float(call.q_len * call.k_len * batch * heads), dtype=torch.float64)
        return visible * min(config.top_k / num_k, 1.0), visible
    ranks = call.tokens.query_ranks(call.query.device)
    computed, visible = _count(ranks, config)
    rows = batch // ranks.shape[0] * heads
    return computed * rows, visible * rows


def _count(ranks: Tensor, config: MobaConfig) -> tuple[Tensor, Tensor]:
    """Causal pairs read and visible for queries of these ranks: own block up to itself, whole past blocks."""
    ranks = ranks[ranks >= 0]
    past = (ranks // config.block_size).clamp(max=config.top_k - 1)
    computed = (ranks % config.block_size + 1 + past * config.block_size).sum(dtype=torch.float64)
    return computed, (ranks + 1).sum(dtype=torch.float64)


MECHANISM = Mechanism(
    name="moba",
    summary="each query picks the key blocks whose mean key it matches best; for models trained with it",
    source="MoBA, arXiv 2502.13189; FlashMoBA, arXiv 2511.11571",
    config=MobaConfig,
    capabilities=Capabilities(triton=True),
    attend=attend,
    select=select,
    attended=attended,
    describe=describe,
)
