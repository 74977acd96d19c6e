"""A mechanism with a fixed pattern for tiny pipelines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.grid import hilbert_permutation
from hf_attn.mechanism import Capabilities, DiffusionConfig, Mechanism
from hf_attn.ops import block_sparse_attention
from hf_attn.pattern import BlockPattern


@dataclass
class BandConfig(DiffusionConfig):
    """Query block i reads the nearest key blocks along a Hilbert curve; blocks with other tokens read everything.

    Args:
        block_size: tokens per block, >= 1.
    """

    block_size: int = 8


def band_pattern(call: AttentionCall, config: BandConfig) -> BlockPattern:
    """Blocks in curve order, text last; all of them at density 1."""
    size = config.block_size
    blocks, lattice = -(-call.k_len // size), call.tokens.grid.tokens // size
    near = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs()
    keep = near < max(round((config.density or 1.0) * blocks), 1)
    beside = torch.arange(blocks) >= lattice
    keep = keep | beside | beside[:, None]
    return BlockPattern.from_dense(keep[None, None], block_q=size, block_k=size, q_len=call.q_len, k_len=call.k_len)


def attend(call: AttentionCall, config: BandConfig) -> Tensor:
    order = hilbert_permutation(call.tokens.grid, text="last")
    pattern = band_pattern(call, config)
    computed, visible = pattern.pairs()
    call.layer.record(path="torch", computed=float(computed), visible=float(visible))
    bias = None
    if call.tokens.index is not None:
        hidden = ~order.apply(call.tokens.real_keys(), 1)
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]
    moved = (order.apply(x) for x in (call.query, call.key, call.value))
    return order.undo(block_sparse_attention(*moved, pattern, scale=call.scale, key_bias=bias))


def attended(call: AttentionCall, config: BandConfig, rows: Tensor) -> Tensor:
    """The keys that `attend` reads for some query rows, bool `[B | 1, 1, R, S]`."""
    order = hilbert_permutation(call.tokens.grid, text="last")
    mask = order.undo(order.undo(band_pattern(call, config).to_token_mask(), 2), 3)
    real = call.tokens.real_keys()
    return (mask if real is None else mask & real[:, None, None])[:, :, rows]


BAND = Mechanism(
    name="band",
    summary="a band along the curve",
    source="a test",
    config=BandConfig,
    attend=attend,
    attended=attended,
    capabilities=Capabilities(diffusers=True),
)


# Small enough that every tiny pipeline is really sparse.
SMALL = {"min_tokens": 0, "dense_steps": 0, "block_size": 4}
