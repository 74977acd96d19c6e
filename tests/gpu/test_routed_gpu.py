"""Routed attention on a real GPU: half-precision numerics, graph capture, long sequences."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.call import TokenLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

# Against the fp32 torch path with the same routes (bounds of the reference implementation).
MAX_ERROR, MEAN_ERROR, ROUTE_MISMATCH = 2e-2, 4e-4, 5e-3


def draw(n: int, dim: int = 128, heads: int = 8, kv_heads: int = 2, dtype=torch.bfloat16, batch: int = 1):
    generator = torch.Generator("cuda").manual_seed(n)
    return [
        torch.randn(batch, h, n, dim, device="cuda", generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)
    ]


def assert_close(got: torch.Tensor, right: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(right.abs().max()) / 4)  # gradients of popular keys are sums over many rows
    right = right.detach()
    error = (got.float() - right).abs() / scale
    # Rounding the truth to the result's type already costs this much on average.
    rounding = float((right.to(got.dtype).float() - right).abs().mean()) / scale
    assert error.max() <= MAX_ERROR and error.mean() <= MEAN_ERROR + rounding, (
        f"{what}: {error.max():.1e}, mean {error.mean():.1e}"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "free"])
@pytest.mark.parametrize(("n", "dim", "block"), [(2048, 128, 128), (1999, 64, 64), (1000, 256, 96), (777, 80, 16)])
def test_half_precision(n, dim, block, causal, dtype, monkeypatch):
    query, key, value = draw(n, dim, dtype=dtype)
    options = {"block_size": block, "causal": causal}
    results = {}
    for backend, wide in (("torch", torch.float32), ("triton", dtype)):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        leaves = [t.to(wide).requires_grad_() for t in (query, key, value)]
        routes = ops.select_routes(*leaves[:2], top_k=4, **options)
        results[backend + " routes"] = routes
        out, lse = ops.routed_block_attention(*leaves, results["torch routes"], return_lse=True, **options)
        results[backend] = [out, lse, *torch.autograd.grad(out.float().square().sum() / 2, leaves)]
    mismatch = (results["torch routes"] != results["triton routes"]).float().mean()
    assert mismatch < ROUTE_MISMATCH
    for name, got, right in zip(("out", "lse", "dq", "dk", "dv"), results["triton"], results["torch"], strict=True):
        assert_close(got, right, name)


def test_fp32(monkeypatch):
    query, key, value = draw(700, 64, dtype=torch.float32)
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        wide = torch.float64 if backend == "reference" else torch.float32
        leaves = [t.to(wide).requires_grad_() for t in (query, key, value)]
        routes = ops.select_routes(query, key, block_size=32, top_k=5) if backend == "reference" else routes  # noqa: F821
        out = ops.routed_block_attention(*leaves, routes, block_size=32)
        results[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for got, right in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=5e-5)


def test_both_forms_of_the_query_gradient_agree_and_one_repeats(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value = (t.requires_grad_() for t in draw(4096))
    grads = []
    try:
        for deterministic in (False, *[True] * 50):
            torch.use_deterministic_algorithms(deterministic)
            routes = ops.select_routes(query, key, block_size=128, top_k=8)
            out = ops.routed_block_attention(query, key, value, routes, block_size=128)
            grads.append([routes, out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in grads[2:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[1], other, strict=True))
    assert torch.equal(grads[0][1], grads[1][1])
    assert_close(grads[0][2], grads[1][2].float(), "dq")
    assert all(torch.equal(a, b) for a, b in zip(grads[0][3:], grads[1][3:], strict=True))


def test_skewed_routes(monkeypatch):
    """Every query reads block 0, as with an attention sink."""
    query, key, value = draw(4096)
    routes = torch.randint(0, 32, (1, 8, 4096, 4), device="cuda", dtype=torch.int32)
    routes[..., 0] = 0
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        leaves = [t.to(torch.float32 if backend == "torch" else t.dtype).requires_grad_() for t in (query, key, value)]
        out = ops.routed_block_attention(*leaves, routes, block_size=128)
        results[backend] = [out, *torch.autograd.grad(out.float().square().sum() / 2, leaves)]
    for name, got, right in zip(("out", "dq", "dk", "dv"), results["triton"], results["torch"], strict=True):
        assert_close(got, right, name)


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph(packed, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value = (t.requires_grad_() for t in draw(1024))
    cu = torch.tensor([0, 300, 301, 900, 1024], device="cuda")
    tokens = TokenLayout.packed(cu, cu, 1024, 1024) if packed else None

    def step():
        routes = ops.select_routes(query, key, block_size=64, top_k=3, tokens=tokens)
        out = ops.routed_block_attention(query, key, value, routes, block_size=64, tokens=tokens)
        return out, *torch.autograd.grad(out.float().sum(), (query, key, value))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, fresh in zip((query, key, value), draw(1024 + 1), strict=True):
            tensor.copy_(fresh[:, :, :1024])
    graph.replay()
    for got, right in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


def test_decoding_equals_the_full_pass(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value = draw(3000)
    routes = ops.select_routes(query, key, block_size=128, top_k=4)
    full = ops.routed_block_attention(query, key, value, routes, block_size=128)
    for length in (1, 128, 2999, 3000):
        rows = query[:, :, length - 1 : length], key[:, :, :length], value[:, :, :length]
        chosen = ops.select_routes(*rows[:2], block_size=128, top_k=4)
        step = ops.routed_block_attention(*rows, chosen, block_size=128)
        torch.testing.assert_close(step, full[:, :, length - 1 : length], rtol=2e-2, atol=2e-2)


def test_long_sequence_stays_linear_in_memory(monkeypatch):
    """256k tokens: the matrix of all scores of one head would take 2 GiB, of all pairs 128 GiB."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    n = 1 << 18
    query, key, value = (t.requires_grad_() for t in draw(n, heads=4, kv_heads=1))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    routes = ops.select_routes(query, key, block_size=128, top_k=8)
    out = ops.routed_block_attention(query, key, value, routes, block_size=128)
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    assert all(t.isfinite().all() for t in (out, *grads))
    extra = torch.cuda.max_memory_allocated() - before
    size = query.numel() * 2
    assert extra <= 10 * size, f"{extra / size:.1f} times the query"
    part = slice(n - 64, n)
    right = ops.routed_block_attention(query[:, :, part], key, value, routes[:, :, part], block_size=128)
    torch.testing.assert_close(out[:, :, part], right, rtol=2e-2, atol=2e-2)
