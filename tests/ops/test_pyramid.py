"""pyramid_attention: paths agree, limits are dense attention, edges are right, levels follow their rules."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.pyramid import op, pooling, torch_path
from tests.budget import assert_as_good_as_eager

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def inputs(q_len=70, k_len=None, batch=2, heads=4, kv_heads=2, dim=12, value_dim=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_len, value_dim = q_len if k_len is None else k_len, value_dim or dim
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def random_levels(q_len, k_len, block_q, block_k, batch=2, heads=4, seed=0, zeros=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // block_q), -(-k_len // block_k))
    choice = torch.tensor([0, 1, 2, 4, 8] if zeros else [1, 2, 4, 8], dtype=torch.uint8)
    return choice[torch.randint(len(choice), shape, generator=generator)]


def with_gradients(query, key, value, levels, grad, **options):
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = ops.pyramid_attention(*leaves, levels, return_lse=True, **options)
    loss = (out * grad).sum() + torch.where(lse.isfinite(), lse, 0).sum().to(out.dtype)
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach(), "dq": grads[0], "dk": grads[1], "dv": grads[2]}


SHAPES = [(q, q) for q in (1, 2, 5, 7, 8, 31, 64, 100)] + [(3, 90), (90, 40)]


@pytest.mark.parametrize("tail", ["replicate", "exact"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
def test_torch_path_matches_reference(q_len, k_len, causal, tail, monkeypatch):
    query, key, value = inputs(q_len, k_len, value_dim=20)
    levels = random_levels(q_len, k_len, 12, 16)
    grad = torch.randn(2, 4, q_len, 20)
    options = {"block_q": 12, "block_k": 16, "causal": causal, "tail": tail}
    results = {}
    for name, backend, dtype in (
        ("got", "torch", torch.float32),
        ("eager", "reference", torch.float32),
        ("oracle", "reference", torch.float64),
    ):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        tensors = (t.to(dtype) for t in (query, key, value))
        results[name] = with_gradients(*tensors, levels, grad.to(dtype), **options)
    for name, got in results["got"].items():
        assert_as_good_as_eager(got, results["eager"][name], results["oracle"][name], what=name)
    assert path_counts()["pyramid_attention | torch"] == 1


@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_grouped_heads(ratio, sparse_path):
    query, key, value = inputs(50, heads=8 if ratio != 3 else 6, kv_heads=8 // ratio if ratio != 3 else 2)
    levels = random_levels(50, 50, 16, 16, heads=query.shape[1])
    options = {"block_q": 16, "block_k": 16}
    wide = [x.repeat_interleave(ratio, 1) for x in (key, value)]
    expected = ops.pyramid_attention(query, *wide, levels, **options)
    torch.testing.assert_close(ops.pyramid_attention(query, key, value, levels, **options), expected, **TOLERANCE)


def test_gradcheck(sparse_path):
    query, key, value = (
        x.requires_grad_() for x in inputs(21, batch=1, heads=2, kv_heads=1, dim=3, dtype=torch.double)
    )
    levels = random_levels(21, 21, 8, 8, batch=1, heads=2)
    for tail in ("replicate", "exact"):
        options = {"block_q": 8, "block_k": 8, "tail": tail, "return_lse": True}
        run = lambda *t, o=options: ops.pyramid_attention(*t, levels.clamp(min=1), **o)  # noqa: E731
        assert torch.autograd.gradcheck(run, (query, key, value), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_level_one_everywhere_is_dense_attention(causal, sparse_path):
    query, key, value = inputs(75, heads=2, dim=16)
    levels = torch.ones(1, 1, 5, 5, dtype=torch.uint8)
    got = ops.pyramid_attention(query, key, value, levels, block_q=16, block_k=16, causal=causal)
    torch.testing.assert_close(got, scaled_dot_product_attention(query, key, value, is_causal=causal), **TOLERANCE)


def test_level_eight_everywhere_is_attention_over_means(sparse_path):
    query, key, value = inputs(64, heads=2, dim=16)
    levels = torch.full((1, 1, 4, 4), 8, dtype=torch.uint8)
    pooled = [x.unflatten(2, (-1, 8)).mean(3) for x in (key, value)]
    bias = torch.full((64, 8), math.log(8))
    out, lse = ops.pyramid_attention(query, key, value, levels, block_q=16, block_k=16, return_lse=True)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, *pooled, attn_mask=bias), **TOLERANCE)
    expected = (query @ pooled[0].mT / 4 + bias).logsumexp(-1)
    torch.testing.assert_close(lse, expected, **TOLERANCE)


@pytest.mark.parametrize(("length", "tail"), [(96, "replicate"), (96, "exact"), (83, "exact"), (5, "exact")])
def test_constant_keys_give_the_mean_of_the_values(length, tail, sparse_path):
    query, key, value = inputs(length)
    key[:] = key[:, :, :1]
    levels = random_levels(length, length, 16, 16, zeros=False)
    got = ops.pyramid_attention(query, key, value, levels, block_q=16, block_k=16, tail=tail)
    expected = value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(got)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("length", [1, 3, 8, 29, 40, 61])
def test_equal_tokens_in_every_pool_give_the_dense_result(length, sparse_path):
    """tail="exact": nothing is lost by pooling equal tokens, whatever the length and the levels."""
    query, key, value = inputs(length)
    key, value = (x[:, :, torch.arange(length) // 8 * 8] for x in (key, value))
    levels = random_levels(length, length, 8, 16, zeros=False)
    got = ops.pyramid_attention(query, key, value, levels, block_q=8, block_k=16, tail="exact")
    torch.testing.assert_close(got, scaled_dot_product_attention(query, key, value, enable_gqa=True), **TOLERANCE)


def test_gradients_of_padding_do_not_leak(sparse_path):
    """tail="exact" on padded rows: gradients are those of the rows alone, and 0 on padding that holds NaN."""
    lengths, total = [37, 50], 50
    query, key, value = inputs(total)
    levels = random_levels(total, total, 16, 16)
    grad = torch.randn(2, 4, total, 12)
    tokens = TokenLayout.padded(torch.tensor([total - n for n in lengths]), torch.tensor(lengths), total, total)
    padded = [x.clone() for x in (query, key, value)]
    for x in padded:
        x[0, :, : total - 37] = float("nan")
    options = {"block_q": 16, "block_k": 16, "tail": "exact"}
    got = with_gradients(*padded, levels, grad, tokens=tokens, **options)
    for row, n in enumerate(lengths):
        part = levels[row : row + 1, :, : -(-n // 16), : -(-n // 16)]
        own = [x[row : row + 1, :, total - n :] for x in (query, key, value, grad)]
        alone = with_gradients(*own[:3], part, own[3], **options)
        for name in alone:
            torch.testing.assert_close(got[name][row : row + 1, :, total - n :], alone[name], **TOLERANCE)
    for name in ("out", "dq", "dk", "dv"):
        assert (got[name][0, :, : total - 37] == 0).all()


def test_future_tokens_change_nothing(sparse_path):
    """Causal with any levels, also pooled ones on the diagonal: neither values, nor NaN, nor infinities come back."""
    query, key, value = inputs(61)
    levels = random_levels(61, 61, 16, 16)
    options = {"block_q": 16, "block_k": 16, "causal": True}
    before = ops.pyramid_attention(query, key, value, levels, **options)
    for poison in (50.0, float("nan"), float("inf")):
        for x in (query, key, value):
            x[:, :, 41:] = poison
        after = ops.pyramid_attention(query, key, value, levels, **options)
        torch.testing.assert_close(after[:, :, :41], before[:, :, :41], **TOLERANCE)


def test_rows_without_a_block_are_zero(sparse_path):
    query, key, value = inputs(40)
    levels = random_levels(40, 40, 16, 16)
    levels[:, :, 1] = 0
    got = with_gradients(query, key, value, levels, torch.randn(2, 4, 40, 12), block_q=16, block_k=16)
    assert (got["out"][:, :, 16:32] == 0).all() and (got["lse"][:, :, 16:32] == -math.inf).all()
    assert (got["dq"][:, :, 16:32] == 0).all() and all(x.isfinite().all() for x in (got["dk"], got["dv"]))


def test_skipped_blocks_may_hold_anything(sparse_path):
    query, key, value = inputs(48)
    levels = random_levels(48, 48, 16, 16)
    levels[..., 1] = 0
    options = {"block_q": 16, "block_k": 16}
    expected = ops.pyramid_attention(query, key, value, levels, **options)
    key[:, :, 16:32], value[:, :, 16:32] = float("nan"), float("inf")
    torch.testing.assert_close(ops.pyramid_attention(query, key, value, levels, **options), expected, **TOLERANCE)


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
def test_scores_far_from_zero(shift, monkeypatch):
    query, key, value = inputs(64)
    query[..., 0], key[..., 0] = 1.0, shift * 12**0.5
    levels = random_levels(64, 64, 16, 16)
    results = []
    for backend, dtype in (("torch", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        tensors = (x.to(dtype) for x in (query, key, value))
        results.append(ops.pyramid_attention(*tensors, levels, block_q=16, block_k=16))
    assert_as_good_as_eager(*results)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_large_calls(dtype, causal, monkeypatch):
    """Calls large enough for the fused kernel: as good as dense attention in that dtype on the pooled keys."""
    monkeypatch.setattr(torch_path, "SMALL", 0)
    query, key, value = inputs(200, dim=16, dtype=dtype)
    levels = random_levels(200, 200, 64, 32)
    options = {"block_q": 64, "block_k": 32, "causal": causal}
    got = ops.pyramid_attention(query, key, value, levels, return_lse=True, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    oracle = ops.pyramid_attention(*(x.double() for x in (query, key, value)), levels, return_lse=True, **options)
    # What rounding the pooled keys and values alone costs.
    weights, members = pooling.pool_counts(200, 32, "replicate")
    rounded = [
        (pooling.pool_sums(x.double(), 32, "replicate") / members[..., None]).to(dtype).double().flatten(2, 3)
        for x in (key, value)
    ]
    mask = op.reference.pool_mask(levels, 32).repeat_interleave(64, 2)[:, :, :200] & (weights.flatten() > 0)
    if causal:
        last = pooling.last_positions(200, 32, "replicate").flatten()
        mask = mask & (last <= torch.arange(200)[:, None])
    bias = torch.where(mask, weights.flatten().clamp(min=1).double().log(), -math.inf)
    eager = scaled_dot_product_attention(
        query, *(x.to(dtype) for x in rounded), attn_mask=bias.to(dtype), enable_gqa=True
    )
    seen = mask.any(-1).expand(2, 4, 200)
    assert_as_good_as_eager(got[0][seen], eager[seen], oracle[0][seen])
    assert (got[0][~seen] == 0).all() and (got[1][~seen] == -math.inf).all()
    torch.testing.assert_close(got[1][seen], oracle[1][seen].float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_custom_ops(packed):
    query, key, value = (x.requires_grad_() for x in inputs(20, batch=1))
    cu = torch.tensor([0, 11, 20])
    index = TokenLayout.packed(cu, cu, 20, 20).index if packed else None
    rule = (True, 0.3, "softmax", "max", 4, 0, 0, "energybound", [0.5, 0.6, 0.7, 0.8], 0.06, 0, [0.7] * 3, None, [], 0)
    torch.library.opcheck(op.pyramid_levels, (query.detach(), key.detach(), index, 8, 8, *rule))
    levels = op.pyramid_levels(query.detach(), key.detach(), index, 8, 8, *rule)
    torch.library.opcheck(op.pyramid_attention, (query, key, value, levels, index, 8, 8, True, 0.3, "replicate"))


# -- levels ------------------------------------------------------------------------------------------------------------


def test_threshold_takes_the_crossing_block_and_energybound_does_not():
    importance = torch.tensor([[[[0.1, 0.6, 0.3, 0.0]]]])
    rule = {"bounds": (0.5, 0.65, 0.95, 0.95), "min_full": 0.0}
    assert ops.assign_levels(importance, mode="threshold", **rule)[0, 0, 0].tolist() == [4, 1, 2, 0]
    assert ops.assign_levels(importance, mode="energybound", **rule)[0, 0, 0].tolist() == [0, 2, 4, 0]


def test_quantile_takes_shares_of_the_blocks():
    importance = torch.arange(20.0).flip(0).expand(1, 1, 3, 20)
    levels = ops.assign_levels(importance, mode="quantile", bounds=(0.1, 0.15, 0.15, 0.35))
    assert levels[0, 0, 0].tolist() == [1, 1, 2, 8, 8, 8, 8, *[0] * 13]


def test_ties_go_to_the_earlier_block():
    levels = ops.assign_levels(torch.ones(1, 1, 1, 8), mode="quantile", bounds=(0.25, 0.5, 0.5, 0.5))
    assert levels[0, 0, 0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]


def test_text_stays_at_full_resolution_wherever_it_is():
    query, key, _ = inputs(100)
    spans = [(0, 5), (60, 70)]
    levels = ops.select_levels(
        query, key, block_q=16, block_k=8, mode="quantile", bounds=(0.0, 0.0, 0.0, 0.2), text_spans=spans
    )
    assert (levels[..., 0] == 1).all() and (levels[..., 7:9] == 1).all()
    assert (levels[:, :, 0] == 1).all() and (levels[:, :, 3:5] == 1).all()
    assert (levels[:, :, 1:3, 1:7] != 1).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["threshold", "quantile", "energybound"])
@pytest.mark.parametrize("density", [0.2, 0.3, 0.5, 0.9])
def test_density_is_met(density, mode, causal):
    """Within 0.01 at 32 blocks, forced ones and a similarity cap included."""
    query, key, _ = inputs(1024, batch=1, dim=32)
    levels = ops.select_levels(
        query, key, block_q=32, block_k=32, mode=mode, bounds=(0.5, 0.6, 0.7, 0.8), causal=causal, density=density,
        similarity=(0.0, 0.0, 0.0) if causal else None,
    )  # fmt: skip
    tokens = TokenLayout.full(1, 1024)
    computed, visible = ops.pyramid_pairs(levels, block_q=32, block_k=32, causal=causal, tokens=tokens)
    assert float(visible) == 4 * (1024 * 1025 / 2 if causal else 1024**2)
    assert abs(float(computed / visible) - density) <= 0.01


def test_pairs_are_counted_as_they_are_computed():
    """Against the mask of pools, token by token: a pooled key counts 1 / r of its r members."""
    levels = random_levels(43, 43, 8, 16)
    computed, visible = ops.pyramid_pairs(levels, block_q=8, block_k=16, causal=False, tokens=TokenLayout.full(2, 43))
    wide = levels.repeat_interleave(8, 2)[:, :, :43].repeat_interleave(16, 3)[..., :43].double()
    assert float(computed) == pytest.approx(float(torch.where(wide > 0, 1 / wide.clamp(min=1), 0).sum()))
    assert float(visible) == 2 * 4 * 43 * 43


def test_sampling_leaves_the_global_generator_alone_and_repeats():
    query, key, _ = inputs(200)
    rule = {"block_q": 32, "block_k": 32, "mode": "threshold", "bounds": (0.4, 0.5, 0.6, 0.8)}
    state = torch.get_rng_state()
    first = ops.select_levels(query, key, seed=1, **rule)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ops.select_levels(query, key, seed=1, **rule), first)
    assert not torch.equal(ops.select_levels(query, key, seed=2, **rule), first)
    part = ops.select_levels(query[:, 2:], key[:, 1:], seed=1, first_head=2, **rule)
    assert torch.equal(part, first[:, 2:])


def test_mean_importance_is_the_mean_over_sampled_pairs():
    query, key, _ = inputs(64, batch=1, heads=1, kv_heads=1)
    every = torch.arange(16).expand(1, 1, 16)
    got = ops.sampled_importance(query, key, every, every, block_q=16, block_k=16, reduce="mean")
    p = (query @ key.mT * 12**-0.5).softmax(-1).unflatten(2, (4, 16)).unflatten(4, (4, 16)).mean((3, 5))
    torch.testing.assert_close(got, p / p.sum(-1, keepdim=True))


def attend(**changes):
    query, key, value = inputs(20)
    options = {"levels": random_levels(20, 20, 8, 8), "block_q": 8, "block_k": 8, **changes}
    return ops.pyramid_attention(query, key, value, options.pop("levels"), **options)


def levels_of(**changes):
    query, key, _ = inputs(20)
    rule = {"block_q": 8, "block_k": 8, "mode": "threshold", "bounds": (0.4, 0.5, 0.6, 0.8), **changes}
    return ops.select_levels(query, key, **rule)


BAD = {
    "block_k": (lambda: attend(block_k=12), "block_k must be a multiple of 8"),
    "levels": (lambda: attend(levels=torch.ones(2, 4, 3, 4).byte()), "levels must be uint8 [batch, heads, 3, 3]"),
    "levels dtype": (lambda: attend(levels=torch.ones(2, 4, 3, 3)), "levels must be uint8"),
    "levels heads": (lambda: attend(levels=torch.ones(2, 2, 3, 3).byte()), "levels has 2 heads; allowed: 1 or the"),
    "levels rows": (lambda: attend(levels=torch.ones(3, 4, 3, 3).byte()), "levels has 3 rows; allowed: 1 or the batch"),
    "tail": (lambda: attend(tail="drop"), "tail must be one of 'replicate', 'exact'"),
    "mode": (lambda: levels_of(mode="topk"), "mode must be one of"),
    "bounds": (lambda: levels_of(bounds=(0.5, 0.4, 0.6, 0.8)), "bounds must be four rising numbers"),
    "causal blocks": (lambda: levels_of(causal=True, block_q=16), "causal levels need block_q == block_k"),
    "stride": (lambda: levels_of(causal=True, stride=3), "stride must divide the block size, got stride=3 and block 8"),
    "similarity": (lambda: levels_of(similarity=(2.0, 0.5, 0.5)), "similarity must be three numbers in [-1, 1]"),
    "offsets": (
        lambda: ops.sampled_importance(*inputs(20)[:2], *[torch.full((2, 4, 2), 8)] * 2, block_q=8, block_k=8),
        "offsets_q must lie in 0 to 7",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_no_keys_and_no_queries(sparse_path):
    query, key, value = inputs(0)
    levels = torch.zeros(1, 1, 0, 0, dtype=torch.uint8)
    assert ops.pyramid_attention(query, key, value, levels, block_q=8, block_k=8).shape == (2, 4, 0, 12)
    query = inputs(9)[0]
    out = ops.pyramid_attention(query, key, value, torch.zeros(1, 1, 2, 0).byte(), block_q=8, block_k=8)
    assert (out == 0).all()
