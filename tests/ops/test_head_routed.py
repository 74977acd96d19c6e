"""head_routed_attention: both paths against the reference, every layout, gradients, what is skipped."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.head_routed import choose_top_k, zero_unchosen
from hf_attn.ops.hfattn_sparse.head_routed import reference, torch_path
from tests.budget import assert_as_good_as_eager

SHAPES = [  # heads, kv heads, queries, keys, D, Dv
    (3, 3, 1, 1, 8, 8),
    (6, 2, 7, 7, 16, 24),
    (8, 1, 64, 64, 8, 8),
    (9, 3, 450, 450, 16, 16),
    (4, 2, 1, 33, 16, 16),
    (4, 2, 40, 300, 16, 16),
    (4, 4, 30, 12, 8, 16),
]


def inputs(heads, kv_heads, q_len, k_len, dim, value_dim, batch=2, dtype=torch.float64, seed=0):
    """query, key, value, and a choice: head 0 by all tokens, head 1 by none, the others by some."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    tensors = [torch.randn(batch, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    chosen = torch.rand(batch, heads, q_len, generator=generator) < 0.5
    chosen[:, 0] = True
    chosen[:, 1] = False
    return *tensors, chosen


def run(monkeypatch, path, tensors, chosen, **options):
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = ops.head_routed_attention(*leaves, chosen, **options)
    weight = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum() + (out[..., :1] ** 2).sum(), leaves)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path(shape, causal, monkeypatch):
    *tensors, chosen = inputs(*shape)
    want = run(monkeypatch, "reference", tensors, chosen, causal=causal)
    got = run(monkeypatch, "torch", tensors, chosen, causal=causal)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not got[0][~chosen].any() and not got[1][~chosen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, monkeypatch):
    """As good as dense attention in the same dtype, measured against float64."""
    *exact, chosen = inputs(6, 2, 450, 450, 16, 16)
    low = [x.to(dtype) for x in exact]
    oracle = run(monkeypatch, "reference", [x.double() for x in low], chosen)
    eager = run(monkeypatch, "reference", low, chosen)
    for got, same, want in zip(run(monkeypatch, "torch", low, chosen), eager, oracle, strict=True):
        assert_as_good_as_eager(got, same, want, slack=3.0)


LAYOUTS = {
    "left padding": {"key_start": torch.tensor([0, 20]), "key_length": torch.tensor([60, 40])},
    "right padding": {"key_start": 0, "key_length": torch.tensor([60, 13])},
    "an empty row": {"key_start": 0, "key_length": torch.tensor([60, 0])},
}


@pytest.mark.parametrize("path", ["reference", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding(layout, path, monkeypatch):
    """Padded rows give what each row gives alone; keys of the padding may hold anything."""
    *tensors, chosen = inputs(4, 2, 60, 60, 8, 8)
    options = LAYOUTS[layout]
    start = torch.as_tensor(options["key_start"]).expand(2).tolist()
    for row in range(2):
        rows = slice(start[row], start[row] + int(options["key_length"][row]))
        outside = torch.ones(60, dtype=torch.bool)
        outside[rows] = False
        for x in tensors[1:]:
            x[row][:, outside] = float("nan")
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    got = ops.head_routed_attention(*tensors, chosen, **options)
    for row in range(2):
        rows = slice(start[row], start[row] + int(options["key_length"][row]))
        if rows.stop == rows.start:
            assert not got[row].any()
            continue
        alone = [x[row : row + 1, :, rows] for x in (*tensors, chosen)]
        torch.testing.assert_close(got[row : row + 1, :, rows], ops.head_routed_attention(*alone))


def test_packing(monkeypatch):
    *tensors, chosen = inputs(6, 3, 50, 50, 8, 8, batch=1)
    bounds = torch.tensor([0, 7, 8, 50])
    got = run(monkeypatch, "torch", tensors, chosen, cu_seqlens_q=bounds)
    want = run(monkeypatch, "reference", tensors, chosen, cu_seqlens_q=bounds)
    alone = [x[:, :, 8:] for x in (*tensors, chosen)]
    torch.testing.assert_close(got[0][:, :, 8:], ops.head_routed_attention(*alone))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_only_chosen_pairs_are_computed(monkeypatch):
    """The fused kernel and the products see gathered rows alone; a call below the crossover runs dense and says so."""
    *tensors, chosen = inputs(9, 3, 4100, 4100, 8, 8, batch=1, dtype=torch.float32)
    pairs = []
    attend = torch_path._attend
    monkeypatch.setattr(
        torch_path, "_attend", lambda q, k, *rest: (pairs.append(q.shape[2] * k.shape[2]), attend(q, k, *rest))[1]
    )
    ops.reset_path_counts()
    ops.head_routed_attention(*tensors, chosen)
    assert ops.path_counts() == {"head_routed_attention | torch": 1}
    needed, _ = reference.count_pairs(chosen, 4100, True)
    assert needed <= sum(pairs) < 1.1 * needed
    ops.reset_path_counts()
    short = [x[:, :, :100] for x in (*tensors, chosen)]
    dense = ops.head_routed_attention(*short)
    assert ops.path_counts() == {"head_routed_attention | torch: dense": 1}
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    torch.testing.assert_close(ops.head_routed_attention(*short), dense)


def test_custom_op(monkeypatch):
    from hf_attn.ops.hfattn_sparse.head_routed import op

    *tensors, chosen = inputs(4, 2, 9, 9, 8, 8)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(op.head_routed_attention, (*leaves, chosen, None, True, 0.3, False))
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    compiled = torch.compile(ops.head_routed_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, chosen), ops.head_routed_attention(*tensors, chosen))


def test_bad_input():
    *tensors, chosen = inputs(4, 2, 9, 9, 8, 8)
    for wrong in (chosen[:, :3], chosen.int(), chosen[:, :, :5]):
        with pytest.raises(ValueError, match="heads must be a bool tensor"):
            ops.head_routed_attention(*tensors, wrong)


@pytest.mark.parametrize("count", [2, 6, 12, 24])
def test_choice_of_the_highest(count):
    """Many tokens are chosen for by comparisons, few by sorting; of equal scores the lower head wins."""
    scores = torch.randn(2, 1100, count, generator=torch.Generator().manual_seed(count)).mul(2).round()
    for top_k in {1, count // 2, count}:
        got = choose_top_k(scores.transpose(1, 2).contiguous().transpose(1, 2), top_k)
        assert got.sum(-1).unique().tolist() == [top_k]
        torch.testing.assert_close(got, torch.cat([choose_top_k(part, top_k) for part in scores.split(10, 1)], 1))


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "for a gradient"])
def test_zeros_of_a_dense_call(layout):
    out = torch.randn(2, 3, 5, 4)
    if layout == "tokens first":
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    heads = torch.rand(2, 3, 5) < 0.5
    want = torch.where(heads[..., None], out, 0)
    got = zero_unchosen(out.requires_grad_(layout == "for a gradient"), heads)
    torch.testing.assert_close(got, want)
    assert (got.data_ptr() == out.data_ptr()) == (layout != "for a gradient")
