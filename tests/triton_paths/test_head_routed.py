"""Head-routed attention by the Triton kernels is that of the reference: layouts, GQA, gradients."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.launch import interpreting
from tests.ops.test_head_routed import inputs, run

pytest.importorskip("triton")
if not interpreting():
    pytest.skip("these cases are CPU tensors for the interpreter", allow_module_level=True)

PACKED = torch.tensor([0, 5, 6, 21])
CASES = {
    "GQA 3, Dv != D": ((6, 2, 21, 21, 8, 16), {}),
    "one token": ((3, 3, 1, 40, 8, 8), {}),
    "more queries than keys": ((2, 1, 9, 4, 8, 8), {}),
    "not causal": ((4, 1, 7, 33, 16, 8), {"causal": False}),
    "packed": ((4, 2, 21, 21, 8, 8), {"cu_seqlens_q": PACKED}),
    "padded": ((4, 2, 20, 20, 8, 8), {"key_start": torch.tensor([3]), "key_length": torch.tensor([13])}),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_reference(name, monkeypatch):
    shape, options = CASES[name]
    *tensors, chosen = inputs(*shape, batch=1, dtype=torch.float32)
    ops.reset_path_counts()
    got = run(monkeypatch, "triton", tensors, chosen, **options)
    counted = ops.path_counts()
    assert counted["head_routed_attention | triton"] == counted["head_routed_attention_backward | triton"] == 1
    for a, b in zip(got, run(monkeypatch, "reference", tensors, chosen, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, monkeypatch):
    *tensors, chosen = inputs(4, 2, 70, 70, 16, 16, dtype=dtype)
    got, want = (run(monkeypatch, path, tensors, chosen) for path in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=4e-2)
