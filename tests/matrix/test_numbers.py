"""Values and gradients: against the fp64 reference, against dense attention, in every dtype and shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.mechanism import get_mechanism
from hf_attn.ops import path_counts
from tests.budget import assert_as_good_as_eager
from tests.cases import CASES
from tests.matrix.build import run, runner, tensors, with_gradients

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def on(backend, monkeypatch, function, *args, **kw):
    """Run with HF_ATTN_BACKEND set."""
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    return function(*args, **kw)


def coarse(*leaves):
    """Values every dtype holds exactly, with room between routing scores: all dtypes then choose the same blocks."""
    return [t.to(torch.bfloat16).to(t.dtype) for t in leaves]


@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 63, 127, 129, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_torch_path_matches_reference(case, length, heads, kv_heads, monkeypatch):
    query, key, value = tensors(heads=heads, kv_heads=kv_heads, q_len=length, dim=12, value_dim=20, seed=length)
    grad = torch.randn(2, heads, length, 20)
    got = on("torch", monkeypatch, with_gradients, case, query, key, value, grad)
    eager = on("reference", monkeypatch, with_gradients, case, query, key, value, grad)
    oracle = on("reference", monkeypatch, with_gradients, case, *(t.double() for t in (query, key, value, grad)))
    for name in got:
        assert_as_good_as_eager(got[name], eager[name], oracle[name], what=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case, dtype, monkeypatch):
    query, key, value = coarse(*tensors(q_len=130, dim=16))
    grad = coarse(torch.randn(2, 4, 130, 16))[0]
    half = [t.to(dtype) for t in (query, key, value, grad)]
    got = on("torch", monkeypatch, with_gradients, case, *half)
    eager = on("reference", monkeypatch, with_gradients, case, *half)
    oracle = on("reference", monkeypatch, with_gradients, case, *(t.double() for t in half))
    for name in got:
        assert_as_good_as_eager(got[name], eager[name], oracle[name], what=name)


def test_all_blocks_equals_sdpa(case, sparse_path):
    query, key, value = tensors(q_len=100, heads=6, kv_heads=2, dim=64)
    grad = torch.randn(2, 6, 100, 64)
    got = with_gradients(case, query, key, value, grad, options=case.dense_options)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad((out * grad).sum(), leaves)
    for name, expected in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        torch.testing.assert_close(got[name], expected, rtol=0, atol=2e-5 if name != "out" else 1e-5)
    assert any("torch" in name for name in path_counts())


def test_custom_scale(case, monkeypatch):
    query, key, value = tensors(q_len=60)
    got = on("torch", monkeypatch, run, case, query, key, value, scale=0.7)
    expected = on("reference", monkeypatch, run, case, *(t.double() for t in (query, key, value)), scale=0.7)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_grouped_heads_equal_repeated_heads(case, sparse_path):
    query, key, value = tensors(heads=8, kv_heads=2, q_len=77)
    repeated = run(case, query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1))
    torch.testing.assert_close(run(case, query, key, value), repeated, rtol=0, atol=1e-5)


def test_strided_inputs(case, sparse_path):
    """The host hands over [B, N, H, D] tensors transposed."""
    query, key, value = tensors(q_len=50)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    torch.testing.assert_close(run(case, *strided), run(case, query, key, value), rtol=0, atol=1e-6)


def test_repeats_are_identical(case, sparse_path):
    query, key, value = tensors(q_len=200)
    grad = torch.randn(2, 4, 200, 12)
    first = with_gradients(case, query, key, value, grad)
    for _ in range(3):
        for name, again in with_gradients(case, query, key, value, grad).items():
            assert torch.equal(first[name], again), name


def test_gradcheck(case, sparse_path):
    query, key, value = (t.requires_grad_() for t in tensors(batch=1, q_len=24, dim=4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *t: run(case, *t), (query, key, value), fast_mode=True)


def test_full_graph_compile(case, sparse_path):
    query, key, value = tensors(q_len=60)
    compiled = torch.compile(runner(case), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out = compiled(*leaves)
    out.sum().backward()
    expected = with_gradients(case, query, key, value, torch.ones_like(out))
    torch.testing.assert_close(out, expected["out"], rtol=0, atol=1e-5)
    torch.testing.assert_close(leaves[0].grad, expected["dq"], rtol=0, atol=1e-5)


def test_checkpointing(case, sparse_path):
    query, key, value = tensors(q_len=60)
    expected = with_gradients(case, query, key, value, torch.ones(2, 4, 60, 12))
    for reentrant in (True, False):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out = torch.utils.checkpoint.checkpoint(lambda *t: run(case, *t), *leaves, use_reentrant=reentrant)
        out.sum().backward()
        for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
            assert torch.equal(leaf.grad, expected[name])


def test_attended_rows_are_the_ones_read(case, sparse_path):
    """The analysis mask is exactly what the mechanism reads: dense attention under it gives the same output."""
    if case.pools:
        pytest.skip("pooled keys: tests/mechanisms/test_psa.py counts them")
    query, key, value = tensors(q_len=90)
    mechanism = get_mechanism(case.mechanism)
    config = mechanism.config.from_dict(case.options)
    call = AttentionCall(query, key, value, 0.3, True, TokenLayout.full(2, 90))
    rows = torch.tensor([0, 1, 15, 16, 50, 89])
    mask = mechanism.attended(call, config, rows)
    expected = scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(mechanism(call, config)[:, :, rows], expected, rtol=0, atol=1e-5)


def test_reported_density_is_the_true_one(case, sparse_path):
    """`record` counts exactly the (query, key) pairs of the analysis mask."""
    if case.pools:
        pytest.skip("pooled keys: tests/mechanisms/test_psa.py counts them")
    from hf_attn.call import LayerContext

    query, key, value = tensors(q_len=90)
    seen = {}
    call = AttentionCall(
        query, key, value, 0.3, True, TokenLayout.full(2, 90), LayerContext(record=lambda **kw: seen.update(kw))
    )
    mechanism = get_mechanism(case.mechanism)
    config = mechanism.config.from_dict(case.options)
    mechanism(call, config)
    mask = mechanism.attended(call, config, torch.arange(90)).expand(2, 4, 90, 90)
    assert float(seen["computed"]) == int(mask.sum())
    assert float(seen["visible"]) == 2 * 4 * 90 * 91 / 2
    told = mechanism.describe(config, 90, 90)["density"]
    if told is not None:  # None: it depends on the input
        assert told == pytest.approx(int(mask.sum()) / (2 * 4 * 90 * 91 / 2))
