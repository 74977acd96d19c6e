"""Routed block attention in plain torch against a dense float64 softmax under a boolean mask."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_attn.ops.hfattn_sparse.routed import torch_path
from hf_attn.ops.hfattn_sparse.routed.layout import Geometry, batch_segments, density
from hf_attn.ops.hfattn_sparse.routed.routing import block_centroids, select_routes, to_key_block_major

GOLDEN = Path(__file__).parents[1] / "golden" / "moba.safetensors"
LENGTHS = [1, 2, 7, 63, 127, 129, 300]


def chosen_blocks(routes: torch.Tensor, count: int) -> torch.Tensor:
    """[..., K] -> bool [..., n]"""
    mask = torch.zeros(*routes.shape[:-1], count + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(routes < 0, count, routes).long(), True)[..., :count]


def visible_pairs(routes: torch.Tensor, k_len: int, block_size: int, causal: bool) -> torch.Tensor:
    """bool [B, H, Nq, Nk]"""
    mask = chosen_blocks(routes, -(-k_len // block_size)).repeat_interleave(block_size, -1)[..., :k_len]
    if causal:
        rows = routes.shape[2]
        mask = mask & (torch.arange(k_len) <= torch.arange(rows)[:, None] + k_len - rows)
    return mask


def masked_softmax(query, key, value, mask, scale):
    """Out and lse of dense attention; rows without a key give 0 and -inf."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ value, lse


def with_gradients(tensors, grad_out, grad_lse, mask, scale, dtype):
    """out, lse, dq, dk, dv of the dense form in a type."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out, lse = masked_softmax(*leaves, mask, scale)
    loss = (out * grad_out.to(dtype)).sum() + torch.where(lse > -torch.inf, lse, 0.0).mul(grad_lse.to(dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [out.detach(), lse.detach(), *gradients]


def strided(batch, heads, length, dim, dtype, generator):
    """[B, H, N, D] as hosts hand it over: heads-last memory and a slice of a longer tensor."""
    longer = torch.randn(batch, length + 3, heads, dim, generator=generator, dtype=torch.float64)
    return longer.to(dtype).transpose(1, 2)[:, :, 2 : 2 + length]


def draw_case(seed: int) -> dict:
    rng = random.Random(seed)
    q_len = rng.choice(LENGTHS)
    k_len = q_len if rng.random() < 0.4 else rng.choice(LENGTHS)
    block_size = rng.choice([1, 5, 16, 128])
    head_dim = rng.choice([12, 64, 96])
    return dict(
        q_len=q_len,
        k_len=k_len,
        block_size=block_size,
        top_k=rng.randint(1, min(-(-k_len // block_size) + 1, 24)),
        group=rng.choice([1, 2, 4]),
        kv_heads=rng.choice([1, 2]),
        head_dim=head_dim,
        value_dim=rng.choice([head_dim, 16, 40]),
        batch=rng.choice([1, 2, 3]),
        causal=rng.random() < 0.6,
        dtype=rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
        logits=rng.choice([1, 1, 7, 50]),
        routing=rng.choice(["selected", "arbitrary", "arbitrary"]),
    )


@pytest.mark.parametrize("allow_dense", [True, False], ids=["any-form", "gathered"])
@pytest.mark.parametrize("seed", range(48))
def test_matches_dense_softmax(seed: int, allow_dense: bool):
    case = draw_case(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, k_len, q_len, block_size = case["dtype"], case["k_len"], case["q_len"], case["block_size"]
    heads, count = case["group"] * case["kv_heads"], -(-k_len // block_size)
    query = strided(case["batch"], heads, q_len, case["head_dim"], dtype, generator) * case["logits"]
    key = strided(case["batch"], case["kv_heads"], k_len, case["head_dim"], dtype, generator)
    value = strided(case["batch"], case["kv_heads"], k_len, case["value_dim"], dtype, generator)
    if case["routing"] == "selected":
        routes = select_routes(query, key, block_size=block_size, top_k=case["top_k"], causal=case["causal"])
    else:  # any order, repeats, -1 anywhere, rows without their own block or without any
        routes = torch.randint(-1, count, (case["batch"], heads, q_len, case["top_k"]), generator=generator)
        routes[torch.rand(routes.shape[:3], generator=generator) < 0.15] = -1
    scale = case["head_dim"] ** -0.5
    mask = visible_pairs(routes, k_len, block_size, case["causal"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_out = strided(case["batch"], heads, q_len, case["value_dim"], dtype, generator)
    grad_lse = torch.randn(case["batch"], heads, q_len, generator=generator, dtype=wide)

    options = dict(block_size=block_size, causal=case["causal"], scale=scale, allow_dense=allow_dense)
    out, lse = torch_path.forward(query, key, value, routes, **options)
    gradients = torch_path.backward(grad_out, grad_lse, query, key, value, routes, out, lse, **options)

    inputs = (query, key, value)
    oracle = with_gradients(inputs, grad_out, grad_lse, mask, scale, torch.float64)
    eager = with_gradients(inputs, grad_out, grad_lse, mask, scale, dtype)
    # In float64 eager is the oracle, and a few values cancel to nothing: errors are also measured against the
    # size of the terms that the results are sums of, a score of +-50 rounded to eps included.
    weighed = grad_out.double() @ value.double().repeat_interleave(case["group"], 1).transpose(-1, -2)
    slope = float(weighed.abs().amax() + grad_lse.abs().amax()) * scale
    terms = [value.abs().amax(), 1.0, slope * key.abs().amax(), slope * query.abs().amax(), grad_out.abs().amax()]
    eps = torch.finfo(dtype).eps * (4 + 2 * case["logits"] if dtype != torch.bfloat16 else 1)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, got, right, same, term in zip(names, (out, lse, *gradients), oracle, eager, terms, strict=True):
        assert got.dtype == (wide if name == "lse" else dtype)
        assert torch.equal(got == -torch.inf, right == -torch.inf), name
        got, right, same = (tensor.double().masked_fill(right == -torch.inf, 0.0) for tensor in (got, right, same))
        size = max(float(right.abs().max()), float(term))
        allowed = 2 * (float(torch.nan_to_num(same).sub(right).abs().max()) + eps * size)
        worst = float((got - right).abs().max())
        assert torch.isfinite(got).all() and worst <= allowed, f"{name}: {worst:.2e} > {allowed:.2e} in {case}"
    blind = ~mask.any(-1)
    assert (out[blind] == 0).all() and (gradients[0][blind] == 0).all()


def random_inputs(length, *, k_len=None, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, length, dim), (1, kv_heads, k_len or length, dim), (1, kv_heads, k_len or length, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("logits", [1.0, 30.0])
def test_long_segments_and_rescaling(skewed: bool, logits: float):
    """Long enough for blocks computed alone, batches of short ones, several own tiles and a raised reference."""
    query, key, value = random_inputs(2100, heads=2, kv_heads=1, dim=32)
    if skewed:
        query[..., 0] += 4
        key[:, :, 32:64, 0] += 4
    query *= logits
    routes = select_routes(query, key, block_size=32, top_k=5, causal=True)
    options = dict(block_size=32, causal=True, scale=0.2)
    assert torch_path.plan(routes, q_len=2100, k_len=2100, block_size=32, causal=True) == "gathered"
    out, lse = torch_path.forward(query, key, value, routes, **options)
    grad = torch.randn_like(out)
    gradients = torch_path.backward(grad, None, query, key, value, routes, out, lse, **options)
    mask = visible_pairs(routes, 2100, 32, True)
    zero = torch.zeros(lse.shape)
    expected = with_gradients((query, key, value), grad, zero, mask, 0.2, torch.float64)
    eager = with_gradients((query, key, value), grad, zero, mask, 0.2, torch.float32)
    for got, right, same in zip((out, lse, *gradients), expected, eager, strict=True):
        allowed = 2 * ((same - right).abs().max() + 1e-6 * right.abs().max())
        assert (got - right).abs().max() <= allowed
    again = torch_path.backward(grad, None, query, key, value, routes, out, lse, **options)
    assert all(torch.equal(first, second) for first, second in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k, form", [(5, "gathered"), (13, "masked tiles")])
def test_leading_rows_that_read_everything(top_k: int, form: str, dtype: torch.dtype):
    """They are computed as plain attention; results and gradients are the same as without that."""
    query, key, value = (tensor.to(dtype) for tensor in random_inputs(1000, dim=32))
    routes = select_routes(query, key, block_size=64, top_k=top_k, causal=True)
    assert torch_path.plan(routes, q_len=1000, k_len=1000, block_size=64, causal=True) == form
    grad, grad_lse = torch.randn(query.shape).to(dtype), torch.randn(query.shape[:3])
    mask = visible_pairs(routes, 1000, 64, True)
    for with_lse in (True, False):
        grad_lse = grad_lse if with_lse else torch.zeros_like(grad_lse)
        options = dict(block_size=64, causal=True, scale=0.2)
        out, lse = torch_path.forward(query, key, value, routes, **options)
        passed = grad_lse if with_lse else None
        gradients = torch_path.backward(grad, passed, query, key, value, routes, out, lse, **options)
        expected = with_gradients((query, key, value), grad, grad_lse, mask, 0.2, torch.float64)
        eager = with_gradients((query, key, value), grad, grad_lse, mask, 0.2, dtype)
        for got, right, same in zip((out, lse, *gradients), expected, eager, strict=True):
            allowed = 2 * ((same - right).abs().max() + torch.finfo(dtype).eps * right.abs().max())
            assert (got.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("q_len, causal", [(1, True), (3, True), (2, False)])
def test_decoding_reads_only_chosen_blocks(q_len: int, causal: bool):
    query, key, value = random_inputs(q_len, k_len=1003, dim=32)
    routes = select_routes(query, key, block_size=16, top_k=4, causal=causal)
    routes[0, 0, 0] = -1
    mask = visible_pairs(routes, 1003, 16, causal)
    unread = ~mask.view(1, 2, -1, 1003).any(2)
    key, value = (tensor.masked_fill(unread[..., None], torch.nan) for tensor in (key, value))
    out, lse = torch_path.forward(query, key, value, routes, block_size=16, causal=causal, scale=0.3)
    clean = [torch.nan_to_num(tensor).double() for tensor in (query, key, value)]
    right, right_lse = masked_softmax(*clean, mask, 0.3)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=1e-5)


def reference_selection(query, key, block_size, top_k, causal):
    """The routing rule row by row in float64: bool [B, H, Nq, n]."""
    k_len, rows = key.shape[2], query.shape[2]
    count = -(-k_len // block_size)
    means = [key[:, :, i * block_size : (i + 1) * block_size].double().mean(2) for i in range(count)]
    means = torch.stack(means, 2).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ means.transpose(-1, -2)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(rows):
        position = row + k_len - rows
        if causal and position < 0:
            continue
        past = position // block_size if causal else count
        if causal:
            mask[:, :, row, past] = True
        taken = min(top_k - causal, past)
        # Stable and descending over reversed blocks: of equal scores the later block comes first.
        order = scores[:, :, row, :past].flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :taken]
        mask[:, :, row].scatter_(-1, past - 1 - order, True)
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "q_len, k_len, block_size, top_k",
    [
        (300, 300, 16, 3),
        (129, 300, 5, 7),
        (300, 129, 5, 7),
        (1, 300, 16, 4),
        (700, 700, 5, 9),
        (7, 7, 1, 9),
        (63, 63, 128, 2),
    ],
)
def test_selection(q_len, k_len, block_size, top_k, causal):
    query, key, _ = random_inputs(q_len, k_len=k_len, dim=8)
    routes = select_routes(query, key, block_size=block_size, top_k=top_k, causal=causal)
    count = -(-k_len // block_size)
    assert routes.dtype == torch.int32 and routes.shape == (1, 4, q_len, min(top_k, count))
    assert torch.equal(chosen_blocks(routes, count), reference_selection(query, key, block_size, top_k, causal))
    sortable = torch.where(routes < 0, count, routes)
    assert (sortable[..., 1:] >= sortable[..., :-1]).all(), "ascending, -1 last"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [40, 700, 2500])
def test_ties_go_to_the_later_block(length: int, dtype: torch.dtype):
    query = torch.randn(1, 2, length, 8).to(dtype)
    routes = select_routes(query, torch.ones(1, 1, length, 8, dtype=dtype), block_size=10, top_k=4, causal=True)
    own = torch.arange(length) // 10
    recent = own[:, None] - torch.arange(3, -1, -1)
    expected = torch.stack([torch.cat([row[row >= 0], row[row < 0].clamp(max=-1) * 0 - 1]) for row in recent])
    assert torch.equal(routes, expected.to(torch.int32).expand_as(routes))


@pytest.mark.parametrize("length", [90, 3000])
def test_ties_among_few_values(length: int):
    """Small integers make many equal scores, of both signs and both zeros."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randint(-1, 2, (1, 2, length, 4), generator=generator).float()
    key = torch.randint(-1, 2, (1, 1, length, 4), generator=generator).float().repeat_interleave(10, 2)[:, :, :length]
    for causal in (True, False):
        routes = select_routes(query, key, block_size=10, top_k=6, causal=causal)
        expected = reference_selection(query, key, 10, 6, causal)
        assert torch.equal(chosen_blocks(routes, expected.shape[-1]), expected)


def test_route_dtype_rounds_the_means():
    query, key, _ = random_inputs(200, dim=8)
    rounded = select_routes(query, key, block_size=8, top_k=3, causal=True, route_dtype=torch.bfloat16)
    means = block_centroids(key, 8).to(torch.bfloat16).float()
    by_hand = select_routes(query, means.repeat_interleave(8, 2), block_size=8, top_k=3, causal=True)
    assert torch.equal(rounded, by_hand)


def test_golden_selection_layout_and_results():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    bounds, size = tensors["cu_seqlens"].tolist(), config["block_size"]
    most = tensors["col_nnz"].shape[-1]
    listed = []
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        query, key, value, grad = (tensors[name][start:end].transpose(0, 1)[None] for name in ("q", "k", "v", "dout"))
        for top_k, suffix in ((config["top_k"], ""), (1, "_topk1")):
            routes = select_routes(query, key, block_size=size, top_k=top_k, causal=True)
            options = dict(block_size=size, causal=True, scale=config["head_dim"] ** -0.5)
            out, lse = torch_path.forward(query, key, value, routes, **options)
            right = tensors["out" + suffix][start:end].transpose(0, 1)[None]
            torch.testing.assert_close(out, right, rtol=0, atol=2e-5)
            if not suffix:
                count = -(-(end - start) // size)
                select = tensors["select"][:, start:end, :count].bool()[None]
                assert torch.equal(chosen_blocks(routes, count), select)
                torch.testing.assert_close(lse, tensors["lse"][start:end].t()[None], rtol=0, atol=2e-5)
                grads = torch_path.backward(grad, None, query, key, value, routes, out, lse, **options)
                for got, name in zip(grads, ("dq", "dk", "dv"), strict=True):
                    expected = tensors[name][start:end].transpose(0, 1)[None]
                    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)
                offsets, counts, rows = to_key_block_major(routes, count)
                assert torch.equal(counts[0], tensors["col_nnz"][sequence, :, :count])
                assert (tensors["col_nnz"][sequence, :, count:] == 0).all() and count <= most
                shifted = offsets + sum(map(len, listed))
                expected = tensors["col_offsets"][sequence, :, :count]
                assert torch.equal(torch.where(counts > 0, shifted, 0)[0], expected)
                listed.append(rows)
    assert torch.equal(torch.cat(listed), tensors["row_indices"])


def test_forms_and_density():
    query, key, _ = random_inputs(512)
    sizes = dict(q_len=512, k_len=512, block_size=128, causal=True)
    every = select_routes(query, key, block_size=128, top_k=4, causal=True)
    assert density(every, Geometry(512, 512, 128, True)) == 1.0
    assert torch_path.plan(every, **sizes) == "dense"
    assert torch_path.plan(every, **sizes, allow_dense=False) == "gathered"
    most = every.clone()
    most[:, :, -1, 0] = -1
    assert torch_path.plan(most, **sizes) == "masked tiles"
    few = select_routes(query, key, block_size=128, top_k=1, causal=True)
    assert torch_path.plan(few, **sizes) == "gathered"
    pairs = visible_pairs(few, 512, 128, True).sum() / (4 * 512 * 513 / 2)
    assert abs(density(few, Geometry(512, 512, 128, True)) - float(pairs)) < 1e-6
    partial = torch.tensor([[[[0, 2]]]], dtype=torch.int32)
    assert density(partial, Geometry(1, 300, 128, False)) == (128 + 44) / 300


def test_batches_cover_every_pair_once():
    counts = [0, 5000, 1, 3, 700, 698, 2048, 17, 0, 16]
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    seen = torch.zeros(bounds[-1], dtype=torch.int)
    for batch in batch_segments(bounds, 2048, alone=9):
        assert batch.height == max(batch.counts) and len(batch.blocks) * batch.height <= 2048
        for block, start, count in zip(batch.blocks, batch.starts, batch.counts, strict=True):
            assert bounds[block] <= start and start + count <= bounds[block + 1]
            seen[start : start + count] += 1
    assert (seen == 1).all()


def test_no_keys_and_no_rows():
    query, key, value = random_inputs(5, k_len=1)
    for cut_q, cut_k in ((5, 0), (0, 1)):
        q, k, v = query[:, :, :cut_q], key[:, :, :cut_k], value[:, :, :cut_k]
        routes = select_routes(q, k, block_size=4, top_k=2, causal=True)
        options = dict(block_size=4, causal=True, scale=1.0)
        out, lse = torch_path.forward(q, k, v, routes, **options)
        assert (out == 0).all() and (lse == -torch.inf).all()
        grads = torch_path.backward(out, None, q, k, v, routes, out, lse, **options)
        assert all((grad == 0).all() for grad in grads)
