"""Block-sparse attention on a real GPU: the compiled kernels against the fp32 torch path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.pattern import BlockPattern
from tests.budget import assert_as_good_as_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
RESULTS = ("out", "lse", "dq", "dk", "dv")


def inputs(
    dtype: torch.dtype, q_len: int, k_len: int | None = None, dim: int = 128, heads: int = 8, kv_heads: int = 2,
    batch: int = 2, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """query, key, value and the gradient of the output."""
    g = torch.Generator("cuda").manual_seed(seed)
    k_len = q_len if k_len is None else k_len
    sizes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len))
    return [torch.randn(batch, h, n, dim, generator=g, device="cuda").to(dtype) for h, n in sizes]


def pattern(q_len: int, k_len: int, block_q: int = 128, block_k: int = 128, heads: int = 8) -> BlockPattern:
    """A third of all blocks and the diagonal, other ones for each head."""
    size = {"block_q": block_q, "block_k": block_k, "q_len": q_len, "k_len": k_len}
    g = torch.Generator("cuda").manual_seed(1)
    shape = (1, heads, -(-q_len // block_q), -(-k_len // block_k))
    chosen = BlockPattern.from_dense(torch.rand(shape, generator=g, device="cuda") < 0.3, **size)
    return chosen | BlockPattern.window(1, **size, device="cuda")


def evaluate(
    monkeypatch, backend: str, tensors: list[Tensor], dtype: torch.dtype, *args, **options
) -> dict[str, Tensor]:
    """Results and gradients of `backend` in `dtype`."""
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    *leaves, grad_out = (t.to(dtype) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in leaves]
    out, lse = ops.block_sparse_attention(*leaves, *args, return_lse=True, **options)
    grads = torch.autograd.grad((out, torch.where(lse.isfinite(), lse, 0).sum()), leaves, (grad_out, None))
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *grads), strict=True))


def assert_right(monkeypatch, tensors: list[Tensor], *args, **options) -> None:
    """As good as plain code in the same type, with the fp32 torch path as the truth."""
    dtype = tensors[0].dtype
    got = evaluate(monkeypatch, "triton", tensors, dtype, *args, **options)
    eager = evaluate(monkeypatch, "torch", tensors, dtype, *args, **options)
    exact = evaluate(monkeypatch, "torch", tensors, torch.float32, *args, **options)
    for name in RESULTS:
        # lse is fp32 everywhere, from exact products of the inputs: fp32 rounding of a sum over the head dimension.
        slack, floor = (4.0, 1e-4) if name == "lse" else (2.0, 0.0)
        if dtype == torch.float32:
            slack, floor = 8.0, 1e-4 * float(exact[name].nan_to_num(0, 0, 0).abs().max())
        assert_as_good_as_eager(got[name], eager[name], exact[name], slack=slack, floor=floor, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_numerics(dtype, dim, causal, monkeypatch):
    assert_right(monkeypatch, inputs(dtype, 700, dim=dim), pattern(700, 700), causal=causal)


@pytest.mark.parametrize("blocks", [(1, 16), (16, 16), (48, 100), (64, 64), (128, 32), (256, 512)])
def test_block_sizes(blocks, monkeypatch):
    assert_right(monkeypatch, inputs(torch.bfloat16, 300, 500), pattern(300, 500, *blocks), causal=True)


@pytest.mark.parametrize("q_len", [1, 3, 16])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_decode(q_len, heads, monkeypatch):
    assert_right(monkeypatch, inputs(torch.bfloat16, q_len, 9000), pattern(q_len, 9000, 16, 64, heads), causal=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, monkeypatch):
    lengths = torch.tensor([700, 401], device="cuda")
    tokens = TokenLayout.padded(700 - lengths if side == "left" else 0, lengths, 700, 700)
    tensors = inputs(torch.bfloat16, 700)
    assert_right(monkeypatch, tensors, pattern(700, 700), causal=True, tokens=tokens)


def test_packed(monkeypatch):
    cu = torch.tensor([0, 5, 300, 301, 1000], device="cuda")
    assert_right(monkeypatch, inputs(torch.bfloat16, 1000, batch=1), pattern(1000, 1000), causal=True, cu_seqlens_q=cu)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_hidden_keys_do_not_leak(poison, monkeypatch):
    tensors = inputs(torch.bfloat16, 512)
    clean = evaluate(monkeypatch, "triton", tensors, torch.bfloat16, pattern(512, 512), causal=True)
    for t in tensors[1:3]:
        t[:, :, 500:] = poison
    got = evaluate(monkeypatch, "triton", tensors, torch.bfloat16, pattern(512, 512), causal=True)
    for name in ("out", "lse", "dq"):
        torch.testing.assert_close(got[name][:, :, :500], clean[name][:, :, :500], rtol=2e-2, atol=2e-2)


def test_large(monkeypatch):
    """64k tokens; a window keeps the truth affordable."""
    length = 1 << 16
    size = {"block_q": 128, "block_k": 128, "q_len": length, "k_len": length}
    tensors = inputs(torch.bfloat16, length, heads=32, kv_heads=8, batch=1)
    assert_right(monkeypatch, tensors, BlockPattern.window(256, **size, device="cuda"), causal=True)


def test_repeats_are_bit_equal(monkeypatch):
    tensors, blocks = inputs(torch.bfloat16, 1000), pattern(1000, 1000)
    first = evaluate(monkeypatch, "triton", tensors, torch.bfloat16, blocks, causal=True)
    for _ in range(250):
        again = evaluate(monkeypatch, "triton", tensors, torch.bfloat16, blocks, causal=True)
        assert all(torch.equal(again[name], first[name]) for name in RESULTS)


@pytest.mark.parametrize("padded", [False, True])
def test_captured_in_a_cuda_graph(padded, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value, grad_out = inputs(torch.bfloat16, 400)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    tokens = None
    if padded:
        tokens = TokenLayout.padded(
            torch.tensor([0, 9], device="cuda"), torch.tensor([400, 391], device="cuda"), 400, 400
        )
    blocks = pattern(400, 400)

    def step() -> list[Tensor]:
        out = ops.block_sparse_attention(*leaves, blocks, causal=True, tokens=tokens)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value, _ = inputs(torch.bfloat16, 400)
    blocks = pattern(400, 400)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.block_sparse_attention(query * 2, key, value, blocks, causal=True) + 1

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.testing.assert_close(compiled(query, key, value), layer(query, key, value))
