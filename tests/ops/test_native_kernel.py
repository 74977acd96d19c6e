"""The compiled CPU kernel against attention written out in fp64, and where it must not or need not run."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops import path_counts
from hf_attn.pattern import BlockPattern
from tests.budget import assert_as_good_as_eager

pytestmark = pytest.mark.needs_cxx
DTYPES = [torch.float32, torch.bfloat16]


def written_out(query, key, value, seen, scale, dtype=torch.float64):
    """out and lse of dense attention under the bool mask `seen`, everything in `dtype`."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), *(x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~seen, float("-inf"))
    lse = scores.double().logsumexp(-1)
    weights = (scores.double() - lse.masked_fill(lse.isinf(), 0)[..., None]).exp().to(dtype)
    return weights @ value, lse


def made(batch, heads, kv_heads, q_len, k_len, dim, value_dim, dtype):
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def tokens(blocks, block_q, block_k, q_len, k_len, causal):
    """Bool `[B, H, Nq, Nk]` of blocks `[B, H, nq, nk]`."""
    seen = blocks.repeat_interleave(block_q, 2)[:, :, :q_len].repeat_interleave(block_k, 3)[..., :k_len]
    if causal:
        seen = seen & (torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len)
    return seen


SHAPES = {
    # name: batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k
    "whole blocks": (1, 4, 4, 256, 256, 64, 64, 128, 128),
    "groups of two": (2, 4, 2, 200, 330, 64, 64, 64, 64),
    "groups of three, ends": (1, 6, 2, 77, 131, 128, 64, 32, 48),
    "one key head": (1, 8, 1, 65, 65, 32, 96, 16, 40),
    "odd head dims": (2, 2, 1, 50, 70, 40, 24, 16, 20),
    "tiny": (1, 2, 2, 3, 5, 8, 8, 2, 2),
    "more queries than keys": (1, 2, 1, 90, 40, 64, 32, 32, 16),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_block_sparse(shape, dtype, causal, native_kernel, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    *sizes, block_q, block_k = shape
    query, key, value = made(*sizes, dtype)
    q_len, k_len, scale = query.shape[2], key.shape[2], query.shape[3] ** -0.5
    blocks = torch.rand(query.shape[0], query.shape[1], -(-q_len // block_q), -(-k_len // block_k)) < 0.5
    pattern = BlockPattern.from_dense(blocks, block_q=block_q, block_k=block_k, q_len=q_len, k_len=k_len)
    out, lse = ops.block_sparse_attention(query, key, value, pattern, causal=causal, return_lse=True)
    assert path_counts()["block_sparse_attention | torch: native"] == 1
    seen = tokens(blocks, block_q, block_k, q_len, k_len, causal)
    oracle, plain = (written_out(query, key, value, seen, scale, d) for d in (torch.float64, dtype))
    nothing = ~seen.any(-1)
    assert torch.equal(lse.isinf(), nothing) and bool((out[nothing] == 0).all())
    for got, eager, right in zip((out, lse), plain, oracle, strict=True):
        eager, right = (x.masked_fill(nothing[..., None] if x.dim() == 4 else nothing, 0) for x in (eager, right))
        got = got.masked_fill(nothing[..., None] if got.dim() == 4 else nothing, 0)
        assert_as_good_as_eager(got, eager.to(got.dtype), right, what=str(shape))
