"""The custom ops keep the rules of torch: schema, fake tensors, autograd, tracing; and public ops check their input."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse.block_sparse import op as block_sparse
from hf_attn.ops.hfattn_sparse.routed import op as routed
from hf_attn.pattern import BlockPattern

SIZE = {"block_q": 4, "block_k": 4, "q_len": 10, "k_len": 10}
INDEX = TokenLayout.padded(torch.tensor([0, 3]), torch.tensor([10, 7]), 10, 10).index


def inputs(grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, h, 10, 8, requires_grad=grad) for h in (4, 2, 2)]


@pytest.mark.parametrize("index", [None, INDEX], ids=["full", "padded"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_block_sparse_op(index, bias):
    key_bias = torch.randn(1, 1, 10, requires_grad=True) if bias else None
    pattern = BlockPattern.causal_blocks(**SIZE).indices
    torch.library.opcheck(block_sparse.block_sparse_attention, (*inputs(), pattern, index, key_bias, 4, 4, True, 0.5))


@pytest.mark.parametrize("index", [None, INDEX], ids=["full", "padded"])
@pytest.mark.parametrize("allow_dense", [True, False])
def test_routed_op(index, allow_dense):
    query, key, value = inputs()
    routes = routed.select_routes(query, key, index, 4, 2, True)
    arguments = (query, key, value, routes, index, 4, True, 0.5, allow_dense)
    torch.library.opcheck(routed.routed_block_attention, arguments)
    torch.library.opcheck(routed.select_routes, (*inputs(False)[:2], index, 4, 2, True))


def test_autocast_runs_in_the_autocast_dtype():
    query, key, value = inputs(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.block_sparse_attention(query, key, value, BlockPattern.full(**SIZE))
        assert out.dtype == torch.bfloat16
        routes = ops.select_routes(query, key, block_size=4, top_k=2)
        assert ops.routed_block_attention(query, key, value, routes, block_size=4).dtype == torch.bfloat16


def attend(query=None, key=None, value=None, pattern=None, **options):
    q, k, v = inputs(False)
    query, key, value = (a if b is None else b for a, b in ((q, query), (k, key), (v, value)))
    return ops.block_sparse_attention(query, key, value, pattern or BlockPattern.full(**SIZE), **options)


def route(block_size=4, top_k=2, **options):
    query, key, _ = inputs(False)
    return ops.select_routes(query, key, block_size=block_size, top_k=top_k, **options)


CU = torch.tensor([0, 4, 10])
BAD = {
    "rank": (lambda: attend(query=torch.randn(2, 10, 8)), "query must be [batch, heads, tokens, head_dim]"),
    "heads": (lambda: attend(query=torch.randn(2, 3, 10, 8)), "query heads (3) must be a multiple"),
    "dim": (lambda: attend(query=torch.randn(2, 4, 10, 6)), "must agree in batch and head_dim"),
    "value": (lambda: attend(value=torch.randn(2, 2, 9, 8)), "key and value must agree"),
    "dtype": (lambda: attend(query=torch.randn(2, 4, 10, 8).bfloat16()), "must have one dtype"),
    "int": (lambda: attend(query=torch.ones(2, 4, 10, 8).int()), "must be a floating-point tensor"),
    "pattern type": (lambda: attend(pattern=torch.ones(1)), "pattern must be a hf_attn.pattern.BlockPattern"),
    "pattern size": (
        lambda: attend(pattern=BlockPattern.full(block_q=4, block_k=4, q_len=9, k_len=10)),
        "pattern was made for 9 queries and 10 keys",
    ),
    "pattern heads": (
        lambda: attend(pattern=BlockPattern.from_dense(torch.ones(1, 3, 3, 3).bool(), **SIZE)),
        "pattern has 3 heads; allowed: 1, the KV heads (2) or the query heads (4)",
    ),
    "bias": (lambda: attend(key_bias=torch.randn(1, 1, 9)), "key_bias must be"),
    "two layouts": (lambda: attend(cu_seqlens_q=CU, key_length=torch.tensor([10, 7])), "give one of tokens="),
    "packed batch": (lambda: attend(cu_seqlens_q=CU), "need batch 1, got query batch 2"),
    "tokens": (lambda: attend(tokens=TokenLayout.full(2, 9)), "tokens describes batch 2, 9 queries"),
    "window": (
        lambda: attend(tokens=TokenLayout(2, 10, 10, window=torch.zeros(2, 2, 10).int())),
        "holds a window or an arbitrary mask",
    ),
    "block size": (lambda: route(block_size=0), "block_size must be an integer >= 1, got 0"),
    "top_k": (lambda: route(top_k=1.5), "top_k must be an integer >= 1, got 1.5"),
    "routes": (
        lambda: ops.routed_block_attention(*inputs(False), torch.zeros(2, 4, 9, 1).int(), block_size=4),
        "routes must be an integer tensor [2, 4, 10, k]",
    ),
    "layout": (lambda: route(key_length=torch.ones(2, 2)), "key_length must be an integer tensor [batch]"),
    "cu_seqlens": (
        lambda: TokenLayout.packed(torch.tensor([[0, 4]]), CU, 10, 10),
        "cu_seqlens_q must be a 1-D integer tensor",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("triton", RuntimeError, "HF_ATTN_BACKEND=triton cannot run"),
        ("cuda", ValueError, "HF_ATTN_BACKEND='cuda' is unknown; allowed: auto, reference, torch, native, triton"),
    ],
)
def test_a_forced_backend_that_cannot_run(value, error, message, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (attend, route):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_queries_that_are_not_the_last_tokens_are_refused():
    index = torch.zeros(2, 2, 20, dtype=torch.int32)
    index[:, 1] = torch.cat([torch.arange(10).flip(0), torch.arange(10)])
    with pytest.raises(ValueError, match="needs the queries of a sequence to be its last tokens"):
        attend(tokens=TokenLayout(2, 10, 10, index), causal=True)


def test_only_ops_that_never_wait_for_the_device_may_be_in_a_cuda_graph():
    """Paths that read lists on the host are tagged; Triton paths are not."""
    pytest.importorskip("triton")
    for family in ("block_sparse", "routed", "selection"):
        importlib.import_module(f"hf_attn.ops.hfattn_sparse.{family}.op")
        importlib.import_module(f"hf_attn.ops.hfattn_sparse.{family}.triton_op")
    for name in ("block_sparse_attention", "routed_block_attention", "select_routes", "select_blocks"):
        tagged = {}
        for suffix in ("", "_triton"):
            tagged[suffix] = torch.Tag.cudagraph_unsafe in getattr(torch.ops.hf_attn, name + suffix).default.tags
        assert tagged == {"": True, "_triton": False}, name
