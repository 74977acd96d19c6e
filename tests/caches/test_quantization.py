"""Formats of stored keys and values: rounding, packing, the vectors that break naive code, and bytes."""

from __future__ import annotations

import warnings

import pytest
import torch

from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.ops.hfattn_sparse.paged import dequantize, pack_int4, quantize_per_tensor, quantize_per_token, unpack_int4


def test_pack_round_trip():
    codes = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (3, 5, 4) and torch.equal(unpack_int4(packed), codes)
    assert int(packed[0, 0, 0]) == int(codes[0, 0, 0]) + 16 * int(codes[0, 0, 1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 2.0, -7.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_half_a_step(bits, offset, scale):
    x = (torch.randn(2, 3, 200, 64) + offset) * scale
    codes, step, zero = quantize_per_token(x, bits)
    error = (dequantize(codes, step, zero) - x).abs()
    # The zero point is rounded to fp16, so its own error comes on top.
    exact_zero = -(2**bits - 1) * x.amin(-1) / (x.amax(-1) - x.amin(-1))
    allowed = 0.51 * step.float() + step.float() * (zero.float() - exact_zero).abs()
    # fp16 also rounds the step, so that values at the ends may lie beyond the first or last code.
    exact_step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    allowed = allowed + x.abs().amax(-1) * (step.float() / exact_step - 1).abs()
    assert (error <= allowed[..., None] + 1e-6 * scale).all()
    assert int(codes.max()) == 2**bits - 1 and int(codes.min()) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("constant", [0.0, 1.5, -3.25, 1e-6, -1e-7])
def test_constant_vectors_survive(bits, constant):
    x = torch.full((1, 1, 4, 16), constant)
    codes, step, zero = quantize_per_token(x, bits)
    torch.testing.assert_close(dequantize(codes, step, zero), x, rtol=1e-3, atol=1e-7)


def test_zero_point_beyond_fp16_is_clipped_or_kept():
    x = 1000 + torch.rand(1, 1, 2, 32) * 1e-2
    with pytest.warns(UserWarning, match="zero points beyond float16 were clipped"):
        quantize_per_token(x, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes, step, zero = quantize_per_token(x, 8, torch.float32)
    torch.testing.assert_close(dequantize(codes, step, zero), x, rtol=1e-3, atol=0)


def test_per_tensor_codes():
    x = torch.randn(4, 50, 16)
    scale = absmax_scale(x)
    codes = quantize_per_tensor(x, scale)
    assert int(codes.abs().max()) == 127
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()
    assert int(quantize_per_tensor(x * 3, scale).min()) >= -128
    assert float(absmax_scale(torch.zeros(3))) == 1.0


@pytest.mark.parametrize("name", [None, "int8", "int4", "int8-per-tensor"])
def test_token_bytes_are_those_allocated(name):
    format = KVFormat(name)
    pages = format.allocate((2, 3, 5, 16, 32), torch.zeros(1, dtype=torch.float16), torch.tensor(0.1))
    held = sum(pages.bytes().values()) - (4 if name == "int8-per-tensor" else 0)
    assert held == 2 * 3 * 5 * 16 * format.token_bytes(32, torch.float16)
