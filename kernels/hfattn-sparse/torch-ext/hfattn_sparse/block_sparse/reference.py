"""Block-sparse attention, the specification: a dense mask and one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masked import causal_mask, masked_attention


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j p_ij v_j over keys j of the key blocks that query block `i // block_q` reads.

    p_ij = exp(scale * q_i.k_j + key_bias_j - lse_i). Any dtype including fp64; differentiable.

    Args:
        query, key, value: `[B, Hq, Nq, D]`, `[B, Hkv, Nk, D]`, `[B, Hkv, Nk, Dv]`.
        indices: int `[B | 1, Hq | Hkv | 1, ceil(Nq / block_q), M]`, key blocks of each query block, -1 padded.
        causal: query row r sees keys up to `r + Nk - Nq`.
        key_bias: `[B | 1, Hq | Hkv | 1, Nk]` or None.

    Returns:
        out `[B, Hq, Nq, Dv]`, lse `[B, Hq, Nq]`.
    """
    allowed = token_mask(indices, query.shape[2], key.shape[2], block_q, block_k, query.shape[1])
    if causal:
        allowed = allowed & causal_mask(query.shape[2], key.shape[2], query.device)
    bias = None if key_bias is None else spread_heads(key_bias, query.shape[1])[:, :, None]
    return masked_attention(query, key, value, allowed, scale=scale, bias=bias)


def token_mask(indices: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, q_heads: int) -> Tensor:
    """Bool `[B | 1, Hq | 1, q_len, k_len]` of the (query, key) pairs inside selected blocks."""
    num_k = -(-k_len // block_k)
    blocks = torch.zeros(*indices.shape[:3], num_k + 1, dtype=torch.bool, device=indices.device)
    blocks.scatter_(3, torch.where(indices < 0, num_k, indices).long(), True)
    tokens = blocks[..., :num_k].repeat_interleave(block_q, 2)[:, :, :q_len].repeat_interleave(block_k, 3)[..., :k_len]
    return spread_heads(tokens, q_heads)


def spread_heads(tensor: Tensor, q_heads: int) -> Tensor:
    """From one entry a KV head to one a query head (dim 1); a single entry stays as it is."""
    heads = tensor.shape[1]
    return tensor if heads in (1, q_heads) else tensor.repeat_interleave(q_heads // heads, 1)
