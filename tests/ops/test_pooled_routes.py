"""Choice of key blocks from pools, and attention over a different number of blocks for every query."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.pooled_routes import reference, torch_path
from hf_attn.ops.pooled_routes import SCOPES
from tests.budget import assert_as_good_as_eager

RULES = [("threshold", tau) for tau in (0.05, 0.25, 0.5, 0.97, 1.0)]
RULES += [("top_k", k) for k in (1, 1.6, 2, 3.99, 17, 100)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule, amount", RULES)
def test_the_fast_choice_is_the_specified_one(scope, rule, amount):
    if scope == "block" and rule == "top_k":
        pytest.skip("refused")
    for blocks, queries, heads, kind in [(1, 7, 1, 0), (2, 1, 2, 0), (5, 63, 3, 0), (18, 700, 2, 0), (18, 700, 2, 1)]:
        scores = random(2, heads, blocks, queries, seed=blocks)
        if kind:  # few values: ties everywhere; the other head is flat
            scores = scores.round()
            scores[:, 0] = 1.0
        own = torch.arange(queries) * blocks // queries
        want = reference.select(scores.clone(), own, rule=rule, scope=scope, amount=amount)
        got = torch_path.select(scores.clone(), own, rule=rule, scope=scope, amount=amount)
        # Sums in another order may pass the limit one pair earlier or later where many values are equal.
        apart = reference.to_pools(got != want, scope).sum(1)
        assert int(apart.max()) <= (kind and rule == "threshold"), (blocks, queries, kind)


@pytest.mark.parametrize("scope", ["head_global", "overall"])
def test_the_fast_choice_with_outliers_and_in_fp64(scope):
    scores = random(1, 2, 12, 400, dtype=torch.float64)
    scores[0, 0, 3, 5], scores[0, 0, 4, 6] = 1e6, -1e6  # nearly all others share a bin
    own = torch.arange(400) // 34
    for rule, amount in (("threshold", 0.3), ("top_k", 3.3)):
        want = reference.select(scores.clone(), own, rule=rule, scope=scope, amount=amount)
        assert torch.equal(torch_path.select(scores.clone(), own, rule=rule, scope=scope, amount=amount), want)


@pytest.mark.parametrize("scope", SCOPES)
def test_pools_hold_at_least_one_other_pair_and_all_own_ones(scope):
    scores, own = random(2, 3, 6, 48), torch.arange(48) // 8
    chosen = reference.select(scores, own, rule="threshold", scope=scope, amount=1e-6)
    mine = reference.own_pairs(own, scores)
    others = reference.to_pools(chosen & ~mine, scope).sum(1)
    assert bool((chosen | ~mine).all()) and others.tolist() == [1] * others.numel()


def test_numbers_of_blocks():
    query, key = random(1, 2, 90, 8), random(1, 2, 90, 8, seed=1)
    own = torch.arange(90) // 9
    for scope in ("query_head", "head_global", "overall"):
        chosen = ops.select_pooled_routes(query, key, own, block_size=9, scope=scope, top_k=2.5)
        assert chosen.shape == (1, 2, 90, 10) and int(chosen.sum()) == 2.5 * 2 * 90
        if scope == "query_head":
            assert set(chosen.sum(-1).unique().tolist()) == {2, 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("heads, kv_heads, tokens, keys, size, large", [
    (2, 2, 300, 300, 32, 1.0), (8, 1, 63, 129, 16, 1.0), (3, 1, 7, 5, 2, 1.0), (2, 2, 1, 1, 4, 1.0),
    (4, 2, 127, 300, 300, 1.0), (2, 2, 200, 200, 16, 30.0),
])  # fmt: skip
def test_attention_over_chosen_blocks(dtype, heads, kv_heads, tokens, keys, size, large):
    """Forward and gradients against fp64; a large scale makes log-sums differ by more than float32 can hold."""
    shapes = [(2, heads, tokens, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 16)]
    tensors = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    tensors[0] = tensors[0] * large
    routes = random(2, heads, tokens, -(-keys // size), seed=5) > 0.3
    routes[:, :, :2] = False  # these rows read nothing
    grad_out = random(2, heads, tokens, 16, dtype=dtype, seed=6)
    mask = routes.repeat_interleave(size, -1)[..., :keys]

    def run(function, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad((out * grad_out.to(dtype)).sum(), leaves)]

    def dense(query, key, value):
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return found.masked_fill(~mask.any(-1, keepdim=True), 0)

    ops.reset_path_counts()
    got = run(lambda *x: ops.routed_block_attention(*x, routes, block_size=size, causal=False), dtype)
    assert "routed_block_attention | torch: flash tiles" in ops.path_counts() or bool(routes.all())
    oracle, eager = run(dense, torch.float64), run(dense, dtype)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, eager, oracle, strict=True):
        c = torch.nan_to_num(c)
        # A head's tiles are each rounded to half precision, eager attention only its sum.
        assert_as_good_as_eager(a, torch.nan_to_num(b), c, slack=4.0 if dtype == torch.bfloat16 else 2.0, what=name)


def test_lse_has_gradients_and_int_routes_agree():
    query, key, value = (random(1, 2, 100, 8, seed=i, dtype=torch.float64) for i in range(3))
    routes = random(1, 2, 100, 7, seed=3) > 0
    numbers = torch.where(routes, torch.arange(7), -1)
    options = {"block_size": 16, "causal": False, "return_lse": True}
    out, lse = ops.routed_block_attention(query, key, value, routes, **options)
    same, lse_same = ops.routed_block_attention(query, key, value, numbers, **options)
    assert torch.equal(out, same) and torch.equal(lse, lse_same)
    leaves = [x[:, :, :20].clone().requires_grad_() for x in (query, key, value)]
    few = random(1, 2, 20, 3, seed=4) > -0.5
    few[..., 0] = True

    def both(*tensors):
        return ops.routed_block_attention(*tensors, few, block_size=8, causal=False, return_lse=True)

    assert torch.autograd.gradcheck(both, leaves)


def test_custom_ops_and_empty_calls():
    from hf_attn.ops.hfattn_sparse.pooled_routes import op
    from hf_attn.ops.hfattn_sparse.routed import op as routed

    query, key, value = (random(1, 2, 12, 4, seed=i) for i in range(3))
    own = torch.arange(12) // 4
    for rule, scope, amount in (("top_k", "query_head", 1.5), ("threshold", "head_global", 0.5)):
        torch.library.opcheck(op.select_pooled_routes, (query, key, own, 4, rule, scope, amount))
    routes = ops.select_pooled_routes(query, key, own, block_size=4, top_k=2)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(routed.routed_block_attention, (*leaves, routes, None, 4, False, 0.5, True))
    for scope in SCOPES:
        none = ops.select_pooled_routes(query[:, :, :0], key, own[:0], block_size=4, scope=scope, tau=0.5)
        assert none.shape == (1, 2, 0, 3)


def test_bad_calls():
    x = torch.zeros(1, 2, 12, 4)
    own = torch.zeros(12, dtype=torch.long)
    for options, text in [
        ({"scope": "head"}, "scope must be one of 'query_head'"),
        ({}, "exactly one of top_k and tau, got top_k=None and tau=None"),
        ({"top_k": 2, "tau": 0.5}, "exactly one of top_k and tau"),
        ({"top_k": 0}, "top_k must be a number of blocks >= 1, got 0"),
        ({"tau": 0.0}, r"tau must be a number in \(0, 1\], got 0.0"),
        ({"tau": 1.5}, r"tau must be a number in \(0, 1\], got 1.5"),
        ({"top_k": 2, "scope": "block"}, "scope='block' has no top_k"),
    ]:
        with pytest.raises(ValueError, match=text):
            ops.select_pooled_routes(x, x, own, block_size=4, **options)
    with pytest.raises(ValueError, match=r"own must be integers \[12\]"):
        ops.select_pooled_routes(x, x, own[:3], block_size=4, top_k=1)
    with pytest.raises(ValueError, match="one column for each of the 3 blocks, got 2"):
        ops.routed_block_attention(x, x, x, torch.ones(1, 2, 12, 2, dtype=torch.bool), block_size=4, causal=False)
