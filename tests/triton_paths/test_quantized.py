"""The Triton kernel of quantised attention is the formula of the reference."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops import path_counts, reset_path_counts
from hf_attn.ops.hfattn_sparse.launch import interpreting
from tests.ops.test_quantized import MODES, draw, flips

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    {}, {"heads": 6, "kv": 2, "batch": 2, "q_len": 33, "k_len": 45}, {"value_dim": 24, "dim": 40, "block": 32},
    {"block": 7, "q_len": 20, "k_len": 20}, {"q_len": 1, "k_len": 3}, {"density": 0.0},
]  # fmt: skip


def compare(qk_bits, pv_bits, shape, dtype, monkeypatch):
    query, key, value, pattern = draw(1, **shape)
    tensors = [x.to(DEVICE, dtype) for x in (query, key, value)]
    options = {"qk_bits": qk_bits, "pv_bits": pv_bits, "q_group": 8, "k_group": 16}
    if shape.get("batch"):
        mask = torch.rand(2, key.shape[2], generator=torch.Generator().manual_seed(0)) < 0.8
        options["key_mask"] = mask.to(DEVICE)
        tensors[1:] = [x.masked_fill(~options["key_mask"][:, None, :, None], float("nan")) for x in tensors[1:]]
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    # In fp32, as the kernel quantises: halves that fp32 and fp64 round to different sides are common in bf16 inputs.
    want = ops.quantized_block_attention(*(x.float() for x in tensors), pattern, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    reset_path_counts()
    got = ops.quantized_block_attention(*tensors, pattern, **options)
    assert path_counts() == {"quantized_block_attention | triton": 1}
    assert got.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    limit = rounding * tensors[2].nan_to_num().abs().max() + flips(options) * want.abs().max()
    error = (got.float() - want).abs()
    # exp2 and exp differ in their last bit, so a weight close to a half may round to the other side: one step of one
    # weight, in few rows.
    step = tensors[2].nan_to_num().abs().max() / {None: 127, 8: 127, 4: 7}[pv_bits]
    assert error.max() <= limit + step
    assert ((error > limit).any(-1).float().mean() if error.numel() else 0) <= 0.03


@pytest.mark.parametrize("qk_bits, pv_bits", MODES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_kernel_is_the_formula(qk_bits, pv_bits, shape, monkeypatch):
    compare(qk_bits, pv_bits, shape, torch.float32, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qk_bits, pv_bits", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(qk_bits, pv_bits, shape, dtype, monkeypatch):
    compare(qk_bits, pv_bits, shape, dtype, monkeypatch)


def test_blocks_above_128_are_refused(monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value, pattern = draw(2, block=256, q_len=300, k_len=300)
    tensors = [x.to(DEVICE) for x in (query, key, value)]
    with pytest.raises(ValueError, match="blocks of at most 128 tokens, got 256 and 256"):
        ops.quantized_block_attention(*tensors, pattern)
