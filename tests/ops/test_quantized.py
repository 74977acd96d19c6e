"""quantized_block_attention: every path is the formula; hidden keys, odd shapes, bad input."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.quantized import torch_path
from hf_attn.ops.hfattn_sparse.quantized.codes import quantize_channels, quantize_groups
from hf_attn.pattern import BlockPattern

MODES = [(8, None), (8, 8), (4, 4), (None, 8), (4, None)]


def draw(seed, batch=1, heads=2, kv=2, q_len=70, k_len=70, dim=16, value_dim=16, block=16, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, q_len, dim, generator=generator)
    key = torch.randn(batch, kv, k_len, dim, generator=generator)
    value = torch.randn(batch, kv, k_len, value_dim, generator=generator)
    mask = torch.rand(1, heads, -(-q_len // block), -(-k_len // block), generator=generator) < density
    pattern = BlockPattern.from_dense(mask, block_q=block, block_k=block, q_len=q_len, k_len=k_len)
    return query, key, value, pattern


def reference(arguments, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setenv("HF_ATTN_BACKEND", "reference")
        wide = [x.double() for x in arguments[:3]]
        return ops.quantized_block_attention(*wide, arguments[3], **options)


def allowed(arguments, options, want):
    """bf16 where it is used; else one code, where fp32 and fp64 disagree on which side of a half a number lies."""
    if options["pv_bits"] is None and torch_path.has_int8_products():
        return 2**-7 * arguments[2].abs().max()
    return 1e-5 * arguments[2].abs().max() + flips(options) * want.abs().max()


def flips(options):
    return 2e-3 if 4 in (options["qk_bits"], options["pv_bits"]) else 2e-4


@pytest.mark.parametrize("qk_bits, pv_bits", MODES)
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"q_len": 1, "k_len": 1}, {"q_len": 7, "k_len": 70}, {"q_len": 33, "k_len": 5}, {"heads": 3, "kv": 1},
        {"heads": 8, "kv": 1, "batch": 2}, {"value_dim": 24, "dim": 8}, {"density": 0.0}, {"density": 1.0, "block": 64},
        {"block": 7}, {"q_len": 0}, {"k_len": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_torch_path_is_the_formula(qk_bits, pv_bits, shape, monkeypatch):
    arguments = draw(3, **shape)
    options = {"qk_bits": qk_bits, "pv_bits": pv_bits, "q_group": 8, "k_group": 16}
    want = reference(arguments, monkeypatch, **options)
    got = ops.quantized_block_attention(*arguments, **options)
    assert got.dtype == torch.float32 and got.shape == want.shape
    if not shape.get("k_len", 1):
        assert got.eq(0).all()
    elif want.numel():
        assert (got - want).abs().max() <= allowed(arguments, options, want)


def test_without_int8_instructions_the_codes_give_the_same(monkeypatch):
    arguments = draw(4)
    options = {"qk_bits": 8, "pv_bits": 8}
    fast = ops.quantized_block_attention(*arguments, **options)
    monkeypatch.setattr(torch_path, "has_int8_products", lambda: False)
    torch.testing.assert_close(ops.quantized_block_attention(*arguments, **options), fast, rtol=0, atol=2e-6)
    plain = ops.quantized_block_attention(*arguments, qk_bits=8)
    assert (plain - reference(arguments, monkeypatch, qk_bits=8)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, monkeypatch):
    query, key, value, pattern = draw(5)
    arguments = (query.to(dtype), key.to(dtype), value.to(dtype), pattern)
    want = reference(arguments, monkeypatch)
    got = ops.quantized_block_attention(*arguments)
    assert got.dtype == dtype
    limit = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert (got.double() - want).abs().max() <= limit * value.abs().max() + (0 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("qk_bits, pv_bits", MODES)
def test_hidden_keys_never_reach_a_row(qk_bits, pv_bits, monkeypatch):
    """NaN and infinity in them change nothing, also not through a scale; a row that sees only such keys gives 0."""
    query, key, value, pattern = draw(6, batch=2, density=0.7)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1, :32] = False
    clean = (query, key, value, pattern)
    dirty = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (key, value)]
    options = {"qk_bits": qk_bits, "pv_bits": pv_bits, "key_mask": mask}
    got = ops.quantized_block_attention(query, *dirty, pattern, **options)
    want = reference(clean, monkeypatch, **options)
    assert got.isfinite().all()
    assert (got - want).abs().max() <= allowed(clean, options, want)
    only = BlockPattern.from_dense(
        torch.eye(5, dtype=torch.bool)[None, None], block_q=16, block_k=16, q_len=70, k_len=70
    )
    out = ops.quantized_block_attention(query, *dirty, only, **options)
    assert out[1, :, :32].eq(0).all() and not out[1, :, 40:].eq(0).all()


def test_large_scores_do_not_overflow(monkeypatch):
    query, key, value, pattern = draw(7, density=1.0)
    arguments = (query * 40, key * 40, value, pattern)
    want = reference(arguments, monkeypatch)
    got = ops.quantized_block_attention(*arguments)
    assert got.isfinite().all() and (got - want).abs().max() < 0.02


def test_visible_nan_shows():
    query, key, value, pattern = draw(8, density=1.0)
    key[:, :, 3] = float("nan")
    assert ops.quantized_block_attention(query, key, value, pattern).isnan().any()


def test_scales_follow_the_groups():
    x = torch.randn(1, 1, 10, 4)
    codes, scales = quantize_groups(x, 8, 4)
    assert codes.dtype == torch.int8 and scales.shape == (1, 1, 3)
    torch.testing.assert_close(scales[0, 0, 2], x[0, 0, 8:].abs().max() / 127)
    assert (codes.abs().amax((0, 1, 3)).view(-1)[:8].view(2, 4).amax(1) == 127).all()
    codes, scales = quantize_channels(torch.zeros(1, 1, 3, 2), 4)
    assert codes.eq(0).all() and scales.allclose(torch.tensor(1e-7 / 7), rtol=1e-6, atol=0)
    half = torch.tensor([7.0, 0.5, 1.5, 2.5])[None, None, None]
    assert quantize_groups(half, 4, 1)[0].flatten().tolist() == [7, 0, 2, 2]


def test_bad_calls():
    query, key, value, pattern = draw(9)
    for options, message in [
        ({"qk_bits": 6}, "qk_bits must be None, 4 or 8, got 6"),
        ({"pv_bits": True}, "pv_bits must be None, 4 or 8, got True"),
        ({"qk_bits": None}, "both None: use ops.block_sparse_attention"),
        ({"q_group": 0}, "q_group must be an integer >= 1, got 0"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, r"key_mask must be bool \[1 or 1, 70\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.quantized_block_attention(query, key, value, pattern, **options)
    with pytest.raises(ValueError, match="inference only"):
        ops.quantized_block_attention(query.requires_grad_(), key, value, pattern)


def test_compiles_as_one_graph():
    query, key, value, pattern = draw(10)
    run = torch.compile(
        lambda q, k, v: ops.quantized_block_attention(q, k, v, pattern) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(run(query, key, value), 2 * ops.quantized_block_attention(query, key, value, pattern))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stay_inside_half_precision(dtype, monkeypatch):
    """Scores of 20: their exponentials are beyond float16."""
    query, key, value, pattern = draw(11, density=1.0)
    arguments = ((query * 5).to(dtype), (key * 5).to(dtype), value.to(dtype), pattern)
    got, want = ops.quantized_block_attention(*arguments), reference(arguments, monkeypatch)
    assert got.isfinite().all() and (got - want).abs().max() < 0.05
