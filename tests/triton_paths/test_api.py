"""The kernel's own functions take the Triton ops on a GPU and give what the torch ops give."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hf_attn.ops import hfattn_sparse as kernel
from hf_attn.ops.hfattn_sparse import api
from hf_attn.ops.hfattn_sparse.launch import interpreting

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LISTS = torch.tensor([[0, -1], [0, 1], [1, 2]], dtype=torch.int32)[None, None]
ROUTES = (torch.arange(20) // 8)[None, None, :, None].expand(1, 2, -1, 1).to(torch.int32)
CALLS = {
    "select_blocks": ("selection", lambda q, k, v: kernel.select_blocks(q, k, **SIZES, rule="top_k", amount=2)),
    "block_sparse_attention": (
        "block_sparse",
        lambda q, k, v: kernel.block_sparse_attention(q, k, v, LISTS.to(DEVICE), **SIZES, causal=True),
    ),
    "select_routes": ("routed", lambda q, k, v: kernel.select_routes(q, k, block_size=8, top_k=2)),
    "routed_block_attention": (
        "routed",
        lambda q, k, v: kernel.routed_block_attention(q, k, v, ROUTES.to(DEVICE), block_size=8),
    ),
}
STATS = {"page_size": 10, "logical_page_size": 5}
CALLS |= {
    "linear_attention": ("linear", lambda q, k, v: kernel.linear_attention(q, q, q + 1, torch.tensor([0.1, 0.4]))),
    "page_statistics": ("paged", lambda q, k, v: kernel.page_statistics(k, **STATS)),
    "page_scores": ("paged", lambda q, k, v: kernel.page_scores(q[:, :, 0], kernel.page_statistics(k, **STATS))),
    "paged_attention": (
        "paged",
        lambda q, k, v: kernel.paged_attention(
            q[:, :, 0], *(t.unflatten(2, (2, 10)) for t in (k, v)), torch.tensor([[[1, -1]]]), length=torch.tensor([17])
        ),
    ),
}
SIZES = {"block_q": 8, "block_k": 8}


@pytest.mark.parametrize("name", CALLS)
def test_functions_take_the_triton_ops(name, monkeypatch):
    family, call = CALLS[name]
    if importlib.util.find_spec(f"{kernel.__name__}.{family}.triton_op") is None:
        pytest.skip(f"{family} has no Triton path in this version")
    tensors = [torch.randn(1, heads, 20, 8, device=DEVICE) for heads in (2, 1, 1)]
    monkeypatch.setattr(api, "_GPUS", ())
    expected = call(*tensors)
    assert f"{name} | triton" not in kernel.path_counts()
    monkeypatch.setattr(api, "_GPUS", (DEVICE,))
    torch.testing.assert_close(call(*tensors), expected)
    assert kernel.path_counts()[f"{name} | triton"] == 1


def test_what_triton_cannot_take_goes_to_torch(monkeypatch):
    monkeypatch.setattr(api, "_GPUS", (DEVICE,))
    for dim, dtype in ((12, torch.float32), (8, torch.float64), (264, torch.float32)):
        tensor = torch.randn(1, 1, 20, dim, dtype=dtype, device=DEVICE)
        kernel.select_blocks(tensor, tensor, **SIZES, rule="top_k", amount=2)
    assert kernel.path_counts()["select_blocks | torch"] == 3
