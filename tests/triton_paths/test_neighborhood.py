"""Neighborhood attention by the Triton kernels is that of the reference: windows, bias, masks, gradients, edges."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.launch import interpreting
from tests.budget import assert_as_good_as_eager
from tests.ops.test_neighborhood import random_case, results

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(seed: int, dtype: torch.dtype = torch.float32) -> None:
    leaves, options = random_case(seed, dims=((8, 8), (16, 24), (24, 8)), largest=12)
    leaves = {name: x.detach().to(dtype).double().to(DEVICE) for name, x in leaves.items()}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    oracle = results(leaves, options, "reference", torch.float64)
    eager = results(leaves, options, "reference", dtype)
    got = results(leaves, options, "triton", dtype)
    assert ops.path_counts()["neighborhood_attention_backward | triton"] == 1
    for name, expected in oracle.items():
        assert_as_good_as_eager(got[name], eager[name], expected, floor=1e-6, what=f"{seed} {name} {options}")


@pytest.mark.parametrize("seed", [1, 4, 6, 13])
def test_random_configuration(seed):
    compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_more_random_configurations(seed):
    compare(seed, (torch.float32, torch.float16)[seed % 2])


def test_a_broken_token_reaches_only_rows_that_see_it():
    query, key, value = (torch.randn(1, 9, 9, 1, 8, device=DEVICE) for _ in range(3))
    clean = ops.neighborhood_attention(query, key, value, kernel_size=3, backend="triton")
    key[0, 0, 0], value[0, 0, 1] = float("nan"), float("inf")
    out = ops.neighborhood_attention(query, key, value, kernel_size=3, backend="triton")
    assert not out[0, 0, 0].isfinite().any()
    torch.testing.assert_close(out[:, 4:], clean[:, 4:])


def test_named_path_says_why_it_cannot_run():
    query, key, value = (torch.randn(1, 9, 9, 1, 12, device=DEVICE) for _ in range(3))
    with pytest.raises(RuntimeError, match="backend='triton' cannot run neighborhood_attention.*multiples of 8"):
        ops.neighborhood_attention(query, key, value, kernel_size=3, backend="triton")
