"""Pyramid attention by the Triton kernel is that of the reference: levels, layouts, edges, gradients."""

from __future__ import annotations

import random

import pytest
import torch

from hf_attn import ops
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.launch import interpreting
from tests.budget import assert_as_good_as_eager

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 5, 7, 8, 17, 31, 40]


def draw(number: int, dtype: torch.dtype = torch.float32):
    """A random call, small enough for the interpreter."""
    pick, generator = random.Random(number), torch.Generator().manual_seed(number)
    layout = pick.choice(["full", "full", "padded", "packed"])
    k_len = pick.choice(LENGTHS)
    q_len = pick.choice([k_len, max(1, k_len // 2), k_len + 3]) if layout == "full" else k_len
    kv_heads, group = pick.choice([(1, 1), (2, 1), (1, 3), (1, 8)])
    dim, value_dim = pick.choice([(8, 8), (24, 8), (8, 16)])
    batch = 1 if layout == "packed" else pick.choice([1, 2])
    shapes = (batch, kv_heads * group, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    options = {"block_q": pick.choice([3, 8, 16, 40]), "block_k": pick.choice([8, 16]), "causal": pick.random() < 0.5}
    options["tail"] = pick.choice(["replicate", "exact"])
    if layout == "padded":
        options["key_start"] = torch.randint(0, k_len, (batch,), generator=generator).to(DEVICE)
    elif layout == "packed":
        cuts = sorted(pick.choices(range(k_len + 1), k=2))
        options["cu_seqlens_q"] = torch.tensor([0, *cuts, k_len], device=DEVICE)
    grid = (-(-q_len // options["block_q"]), -(-k_len // options["block_k"]))
    rows, heads = pick.choice([1, batch]), pick.choice([1, kv_heads * group])
    choice = torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)
    levels = choice[torch.randint(5, (rows, heads, *grid), generator=generator)].to(DEVICE)
    return tensors, levels, options


def compare(number: int, monkeypatch) -> None:
    tensors, levels, options = draw(number)
    results = {}
    for name, backend, dtype in (
        ("got", "triton", torch.float32),
        ("eager", "reference", torch.float32),
        ("oracle", "reference", torch.float64),
    ):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        results[name] = ops.pyramid_attention(*(t.to(dtype) for t in tensors), levels, return_lse=True, **options)
    for what, got, eager, oracle in zip(("out", "lse"), *(results[n] for n in ("got", "eager", "oracle")), strict=True):
        assert torch.equal(got == float("-inf"), oracle == float("-inf")), (number, what)
        assert_as_good_as_eager(got, eager, oracle, floor=1e-6, what=f"{number} {what}")


@pytest.mark.parametrize("number", range(10))
def test_random_calls(number, monkeypatch):
    compare(number, monkeypatch)
    assert path_counts()["pyramid_attention | triton"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100, 200))
def test_many_random_calls(number, monkeypatch):
    compare(number, monkeypatch)


def test_half_precision_rounds_the_pools_and_nothing_else(monkeypatch):
    """fp16 pools round once more than the reference does: one unit in the last place of a key or value."""
    tensors, levels, options = draw(4, torch.float16)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    expected = ops.pyramid_attention(*(t.double() for t in tensors), levels, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.pyramid_attention(*tensors, levels, **options)
    scores = max(float(t.abs().max()) for t in tensors) ** 2 * tensors[0].shape[3] ** 0.5
    assert got.dtype == torch.float16
    error = float((got.double() - expected).abs().max())
    assert error <= torch.finfo(torch.float16).eps * (2 + scores) * float(tensors[2].abs().max())


def test_strides_and_values_that_nobody_may_see(monkeypatch):
    """Heads last in memory; NaN and infinities in the future of a causal row stay there."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 20, 2, 8, generator=generator).transpose(1, 2).to(DEVICE) for _ in range(3))
    levels = torch.ones(1, 1, 3, 3, dtype=torch.uint8, device=DEVICE)
    levels[..., 2, 0] = 4
    options = {"block_q": 8, "block_k": 8, "causal": True}
    expected = ops.pyramid_attention(query, key, value, levels, **options)
    value[:, :, 17:] = float("nan")
    key[:, :, 18:] = float("inf")
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.pyramid_attention(query, key, value, levels, **options)
    torch.testing.assert_close(got[:, :, :17], expected[:, :, :17], rtol=0, atol=1e-5)
    assert got[:, :, 17].isnan().all()


def test_gradients_and_the_custom_op(monkeypatch):
    from hf_attn.ops.hfattn_sparse.pyramid.triton_op import pyramid_attention

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1, 16, 8, generator=generator).to(DEVICE) for _ in range(3)]
    levels = torch.tensor([[[[1, 2], [8, 4]]]], dtype=torch.uint8, device=DEVICE)
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse = ops.pyramid_attention(*leaves, levels, block_q=8, block_k=8, return_lse=True)
        found[backend] = torch.autograd.grad((out.sin() + lse[..., None]).sum(), leaves)
    for got, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.library.opcheck(pyramid_attention, (*tensors, levels, None, 8, 8, False, 0.3, "replicate"))
