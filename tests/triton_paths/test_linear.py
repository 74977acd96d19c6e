"""Linear attention by the Triton kernel is that of the reference: slopes, states, packing, gradients."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.launch import interpreting

pytest.importorskip("triton")
if not interpreting():
    pytest.skip("these cases are CPU tensors for the interpreter", allow_module_level=True)

from hf_attn.ops.hfattn_sparse.linear import triton_path

# batch, heads, tokens, D, E, options
CASES = {
    "one slope a head": ((2, 2, 37, 16, 8), {}),
    "a slope a token": ((1, 2, 33, 8, 24), {"every_token": True}),
    "one token": ((2, 1, 1, 8, 8), {}),
    "no tokens": ((1, 1, 0, 8, 8), {}),
    "several tiles of columns, no state": ((1, 1, 20, 8, 40), {"initial": False}),
    "a head wider than fp32 products take": ((1, 1, 18, 136, 8), {}),
    "packed": ((1, 2, 50, 8, 8), {"borders": [0, 5, 5, 38, 50]}),
    "padding anywhere": ((2, 1, 40, 8, 8), {"mask": True}),
}


def run(path, monkeypatch, shape, dtype=torch.float32, every_token=False, initial=True, borders=None, mask=False):
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    batch, heads, length, dim, width = shape
    generator = torch.Generator().manual_seed(0)
    # Stored tokens first: the kernel has to follow strides.
    leaves = [torch.randn(batch, length, heads, n, generator=generator).transpose(1, 2) for n in (dim, dim, width)]
    if initial:
        rows = batch if borders is None else len(borders) - 1
        leaves.append(torch.randn(rows, heads, dim, width, generator=generator))
    slopes = torch.rand((batch, heads, length) if every_token else heads, generator=generator)
    real = torch.rand(batch, length, generator=generator) < 0.6 if mask else None
    leaves = [t.to(dtype).requires_grad_() if n < 3 else t.requires_grad_() for n, t in enumerate(leaves)]
    out, state = ops.linear_attention(
        *leaves[:3],
        slopes,
        scale=0.5,
        initial_state=leaves[3] if initial else None,
        return_state=True,
        mask=real,
        cu_seqlens=None if borders is None else torch.tensor(borders),
    )
    weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in (out, state)]
    loss = (out.float() * weights[0]).sum() + (state * weights[1]).sum()
    return out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", CASES)
def test_is_the_reference(name, monkeypatch):
    shape, options = CASES[name]
    ops.reset_path_counts()
    got = run("triton", monkeypatch, shape, **options)
    counted = ops.path_counts()
    assert counted["linear_attention | triton"] == counted["linear_attention_backward | triton"] == 1
    for a, b in zip(got, run("reference", monkeypatch, shape, **options), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(float(b.abs().max()) if b.numel() else 0, 1))


def test_steep_and_flat_heads(monkeypatch):
    """Decays of e^-60 a token and of nearly 1: quotients of powers would overflow."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    q, k, v = (torch.randn(1, 2, 70, 8) for _ in range(3))
    slopes = torch.tensor([60.0, 1e-6])
    got = ops.linear_attention(q, k, v, slopes)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    want = ops.linear_attention(q, k, v, slopes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, monkeypatch):
    got, want = (run(path, monkeypatch, (1, 2, 60, 16, 16), dtype) for path in ("triton", "reference"))
    assert got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("length", [64, 130])
def test_segments_are_the_same_recurrence(length, per_token, monkeypatch):
    """Rows cut into segments whose states are added up: values, states and all gradients, forward and reversed."""
    monkeypatch.setattr(triton_path, "BUSY", 64)
    monkeypatch.setattr(triton_path, "SHORTEST", 32)
    assert triton_path._segments(length, 4)[0] > 1
    slopes = torch.rand(2, 2, length) if per_token else torch.rand(2)
    sizes = (2, 2, length, 16), (2, 2, length, 16), (2, 2, length, 24), (2, 2, 16, 24)
    tensors = [torch.randn(size) for size in sizes]
    found = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        results = ops.linear_attention(*leaves[:3], slopes.to(dtype), initial_state=leaves[3], return_state=True)
        loss = sum((r.square() * torch.linspace(0, 1, r.shape[-1], dtype=dtype)).sum() for r in results)
        found[backend] = [*results, *torch.autograd.grad(loss, leaves)]
    for got, right in zip(found["triton"], found["reference"], strict=True):
        assert (got.double() - right).abs().max() <= 2e-5 * right.abs().max()


def test_what_is_not_finite_stays_behind_its_token_across_segments(monkeypatch):
    monkeypatch.setattr(triton_path, "BUSY", 64)
    monkeypatch.setattr(triton_path, "SHORTEST", 32)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value = (torch.randn(1, 1, 128, 16) for _ in range(3))
    value[:, :, 70] = float("nan")
    broken = ops.linear_attention(query, key, value, torch.zeros(1))
    assert broken[:, :, :64].isfinite().all() and broken[:, :, 70:].isnan().all()
