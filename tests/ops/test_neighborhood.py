"""Neighborhood attention: random windows against the dense reference, gradients, special cases, refused input."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.neighborhood import torch_path, torch_tiles
from hf_attn.ops.hfattn_sparse.neighborhood.op import neighborhood_attention, windows_of
from hf_attn.ops.hfattn_sparse.neighborhood.unfused_op import na_av, na_qk
from tests.budget import assert_as_good_as_eager


def random_case(
    seed: int, *, dims: tuple[tuple[int, int], ...] = ((4, 4), (5, 3), (8, 16)), largest: int = 30
) -> tuple[dict[str, Tensor], dict]:
    """Leaves in fp64 and options of one random call; dims: choices of D and Dv; largest: slack of a 1-D grid."""
    rng = random.Random(seed)
    rank = rng.choice([1, 2, 3])
    with_bias = rng.random() < 0.3
    space, window = [], {"kernel_size": [], "dilation": [], "stride": [], "is_causal": []}
    for _ in range(rank):
        kernel = rng.randint(2, (9, 5, 3)[rank - 1])
        kernel += with_bias and kernel % 2 == 0
        dilation = rng.choice([1, 1, 2, 3])
        space.append(
            kernel * dilation + rng.randint(0, (largest, min(largest // 3, 9), min(largest // 6, 4))[rank - 1])
        )
        for name, value in (
            ("kernel_size", kernel),
            ("dilation", dilation),
            ("stride", 1 if with_bias else rng.randint(1, kernel)),
            ("is_causal", not with_bias and rng.random() < 0.3),
        ):
            window[name].append(value)
    batch, kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 3])
    dim, value_dim, extra = *rng.choice(dims), rng.choice([0, 0, 3])
    torch.manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    leaves = {
        "query": leaf(batch, *space, kv_heads * group, dim),
        "key": leaf(batch, *space, kv_heads, dim),
        "value": leaf(batch, *space, kv_heads, value_dim),
    }
    if extra:
        leaves["additional_keys"] = leaf(batch, extra, kv_heads, dim)
        leaves["additional_values"] = leaf(batch, extra, kv_heads, value_dim)
    if with_bias:
        leaves["rpb"] = leaf(kv_heads * group, *(2 * k - 1 for k in window["kernel_size"]))
    options = {**window, "scale": rng.choice([None, 0.3])}
    if rng.random() < 0.25:
        options["key_mask"] = torch.rand(batch, *space) < 0.6
    if extra and rng.random() < 0.5:
        options["additional_key_mask"] = torch.rand(batch, extra) < 0.6
    return leaves, options


def results(leaves: dict[str, Tensor], options: dict, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, lse and all gradients, of both."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    out, lse = ops.neighborhood_attention(**leaves, **options, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse)]
    seen = lse.isfinite()
    loss = (out * upstream[0]).sum() + (lse * upstream[1])[seen].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse, **{f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("seed", range(210))
def test_random_configuration_equals_the_reference(seed, monkeypatch):
    leaves, options = random_case(seed)
    rng = random.Random(seed)
    # Few scores at a time and odd tiles: every way of cutting a call is met.
    monkeypatch.setattr(torch_tiles, "CPU_SCORES", rng.choice([1, 200, torch_tiles.CPU_SCORES]))
    if rng.random() < 0.6:
        sizes = tuple(rng.randint(1, 6) for _ in options["kernel_size"])
        monkeypatch.setattr(torch_tiles, "choose_sizes", lambda windows: sizes)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])
    # Half of the calls find their exponentials out of range and turn to softmax.
    monkeypatch.setattr(torch_path, "LEAST", rng.choice([torch_path.LEAST, 1e30]))
    leaves = {name: x.detach().to(dtype).double() for name, x in leaves.items()}
    oracle = results(leaves, options, "reference", torch.float64)
    eager = results(leaves, options, "reference", dtype)
    got = results(leaves, options, "torch", dtype)
    assert ops.path_counts()["neighborhood_attention | torch"] == 1
    for name, expected in oracle.items():
        floor = 1e-13 if dtype == torch.float64 else 0.0
        assert_as_good_as_eager(got[name], eager[name], expected, floor=floor, what=f"{name} {options}")


@pytest.mark.parametrize("factor", [5.0, 40.0, 1e4])
@pytest.mark.parametrize("where", ["all", "last rows", "bias up", "bias down"])
def test_scores_beyond_the_range_of_the_exponential(factor, where, monkeypatch):
    # Scores of +-30, +-240 and +-60000, everywhere or only where most of the output is written already.
    monkeypatch.setattr(torch_tiles, "CPU_SCORES", 2000)
    torch.manual_seed(5)
    leaves = {name: torch.randn(1, 9, 11, 2, 8) for name in ("query", "key", "value")}
    options = {"kernel_size": 3}
    if where == "all":
        leaves["query"] *= factor
    elif where == "last rows":
        leaves["query"][:, 8] *= factor
    else:
        leaves["rpb"] = torch.randn(2, 5, 5) + (factor if where == "bias up" else -factor)
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items()}
    oracle = results(leaves, options, "reference", torch.float64)
    eager = results(leaves, options, "reference", torch.float32)
    got = results(leaves, options, "torch", torch.float32)
    for name, expected in oracle.items():
        assert_as_good_as_eager(got[name], eager[name], expected, what=name)


def test_scratch_memory_survives_inference_mode_and_other_shapes():
    small, large = torch.randn(1, 7, 7, 1, 4), torch.randn(1, 20, 9, 3, 16)
    expected = [ops.neighborhood_attention(x, x, x, kernel_size=3, backend="reference") for x in (small, large, small)]
    with torch.inference_mode():
        got = [ops.neighborhood_attention(x, x, x, kernel_size=3) for x in (small, large)]
    leaf = small.clone().requires_grad_()
    got.append(ops.neighborhood_attention(leaf, leaf, leaf, kernel_size=3))
    got[-1].sum().backward()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_unfused_equals_the_reference(seed):
    leaves, options = random_case(1000 + seed)
    window = {name: options[name] for name in ("kernel_size", "dilation", "is_causal")}
    rpb = leaves.get("rpb")
    window["is_causal"] = [False] * len(window["is_causal"]) if rpb is not None else window["is_causal"]
    query = leaves["query"].detach().movedim(-2, 1)
    shape = (*query.shape[:-1], math.prod(window["kernel_size"]))
    tensors = [query, torch.randn_like(query), torch.randn(shape).double(), torch.randn_like(query)]
    tensors += [] if rpb is None else [rpb.detach()]
    got = {}
    for backend in ("torch", "reference"):
        q, k, w, v, *bias = (x.clone().requires_grad_() for x in tensors)
        scores = ops.na_qk(q, k, **window, rpb=bias[0] if bias else None, backend=backend)
        mixed = ops.na_av(w, v, **window, backend=backend)
        torch.manual_seed(2)
        loss = (torch.where(scores.isfinite(), scores, 0) * torch.randn(shape)).sum()
        loss = loss + (mixed * torch.randn(mixed.shape)).sum()
        got[backend] = scores, mixed, *torch.autograd.grad(loss, [q, k, w, v, *bias])
    for mine, expected in zip(got["torch"], got["reference"], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_unfused_is_the_fused_op_in_two_steps():
    query, key, value = (torch.randn(2, 3, 9, 8, 4, dtype=torch.float64) for _ in range(3))
    rpb = torch.randn(3, 5, 5, dtype=torch.float64)
    window = {"kernel_size": 3, "dilation": (2, 1)}
    scores = ops.na_qk(query * 0.5, key, rpb=rpb, **window)
    assert scores.shape == (2, 3, 9, 8, 9)
    mixed = ops.na_av(scores.softmax(-1), value, **window)
    heads_last = (x.movedim(1, -2) for x in (query, key, value))
    fused = ops.neighborhood_attention(*heads_last, rpb=rpb, scale=0.5, **window)
    torch.testing.assert_close(mixed, fused.movedim(-2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_every_row_of_a_mask_has_the_whole_window(seed):
    leaves, options = random_case(seed)
    space = leaves["query"].shape[1:-2]
    window = {name: options[name] for name in ("kernel_size", "dilation", "stride")}
    mask = ops.neighborhood_mask(space, **window)
    assert (mask.sum(1) == math.prod(window["kernel_size"])).all()


def test_window_as_large_as_the_grid_is_full_attention():
    query, key, value = (torch.randn(1, 5, 6, 2, 8) for _ in range(3))
    out = ops.neighborhood_attention(query, key, value, kernel_size=(5, 6))
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2)
    torch.testing.assert_close(out.flatten(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_stride_of_the_window_is_blocked_attention():
    query, key, value = (torch.randn(1, 8, 12, 2, 8) for _ in range(3))
    out = ops.neighborhood_attention(query, key, value, kernel_size=(4, 6), stride=(4, 6))
    blocks = [x.view(1, 2, 4, 2, 6, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*blocks)
    expected = expected.unflatten(4, (4, 6)).permute(0, 1, 4, 2, 5, 3, 6).reshape(out.shape)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 3, 8, 11])
def test_flex_equals_the_reference(seed):
    leaves, options = random_case(seed)
    for name in ("rpb", "key_mask", "additional_key_mask"):
        leaves.pop(name, None), options.pop(name, None)
    leaves = {name: x.detach().float() for name, x in leaves.items()}
    for name, dim in (("query", 8), ("key", 8), ("additional_keys", 8), ("value", 8), ("additional_values", 8)):
        if name in leaves:
            leaves[name] = torch.randn(*leaves[name].shape[:-1], dim)
    got, expected = (
        ops.neighborhood_attention(**leaves, **options, return_lse=True, backend=b) for b in ("flex", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_backends_that_cannot_serve_say_so():
    with pytest.raises(RuntimeError, match="needs the package natten"):
        ops.neighborhood_attention(**GRID, kernel_size=3, backend="natten")
    with pytest.raises(ValueError, match="backend='flex' has no rpb"):
        ops.neighborhood_attention(**GRID, kernel_size=3, rpb=torch.randn(2, 5, 5), backend="flex")


def test_gradcheck_with_bias_and_extra_keys():
    make = {"dtype": torch.float64, "requires_grad": True}
    tensors = [torch.randn(1, 5, 6, 2, 3, **make) for _ in range(3)]
    tensors += [torch.randn(2, 5, 5, **make), *(torch.randn(1, 2, 2, 3, **make) for _ in range(2))]

    def attend(query, key, value, rpb, more_keys, more_values):
        extra = {"additional_keys": more_keys, "additional_values": more_values}
        options = {"kernel_size": 3, "dilation": (1, 2), "return_lse": True, "backend": "torch"}
        return ops.neighborhood_attention(query, key, value, rpb=rpb, **extra, **options)

    assert torch.autograd.gradcheck(attend, tensors)


def test_custom_ops_keep_the_rules_of_torch():
    query, key, value = (torch.randn(2, 12, h, 8, requires_grad=True) for h in (4, 2, 2))
    rpb = torch.randn(4, 5, 3, requires_grad=True)
    grid = [3, 4], [3, 2], [1, 1], [1, 2], [False, False]
    torch.library.opcheck(neighborhood_attention, (query, key, value, None, None, *grid, 0.3, True))
    odd = [3, 4], [3, 3], [1, 1], [1, 1], [False, False]
    mask = torch.rand(2, 12) < 0.7
    torch.library.opcheck(
        neighborhood_attention, (query, key, value, rpb.new_ones(4, 5, 5).requires_grad_(), mask, *odd, 0.3, True)
    )
    first = [torch.randn(2, 3, 12, 8, requires_grad=True) for _ in range(2)]
    small = [3, 4], [3, 2], [1, 1], [False, True]
    torch.library.opcheck(na_qk, (*first, None, *small))
    torch.library.opcheck(na_av, (torch.randn(2, 3, 12, 6, requires_grad=True), first[1], *small))


def test_compiles_as_one_graph():
    query, key, value = (torch.randn(1, 6, 6, 2, 8) for _ in range(3))
    attend = torch.compile(
        lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3) * 2, fullgraph=True, backend="aot_eager"
    )
    expected = ops.neighborhood_attention(query, key, value, kernel_size=3) * 2
    torch.testing.assert_close(attend(query, key, value), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value", "query"])
def test_broken_tokens_reach_only_rows_that_see_them(which, bad):
    tensors = {name: torch.randn(1, 9, 9, 2, 8) for name in ("query", "key", "value")}
    clean = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    tensors[which][0, 0, 0] = bad
    broken = {name: x.requires_grad_() for name, x in tensors.items()}
    # Rows that cannot see the corner, and keys that only they can see.
    window = {"kernel_size": 3, "backend": "torch"}
    outs = [ops.neighborhood_attention(**x, **window) for x in (clean, broken)]
    assert not outs[1][0, 0, 0].isfinite().any()
    torch.testing.assert_close(outs[1][:, 4:], outs[0][:, 4:])
    upstream = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, list(x.values()), upstream) for out, x in zip(outs, (clean, broken), strict=True)]
    for mine, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine[:, 6:], expected[:, 6:])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_hidden_everywhere_gives_zero_rows(backend):
    tensors = [torch.randn(1, 6, 6, 1, 4, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 5, 5] = True
    options = {"kernel_size": 3, "key_mask": mask, "return_lse": True, "backend": backend}
    out, lse = ops.neighborhood_attention(*tensors, **options)
    assert (out[0, :3] == 0).all() and (lse[0, :3] == float("-inf")).all() and lse[0, 5, 5].isfinite()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(g.isfinite().all() for g in grads) and (grads[0][0, :3] == 0).all()


def test_empty_batch():
    tensors = [torch.randn(0, 4, 5, 2, 8, requires_grad=True) for _ in range(3)]
    out = ops.neighborhood_attention(*tensors, kernel_size=3, backend="torch")
    assert out.shape == (0, 4, 5, 2, 8)
    out.sum().backward()
    assert tensors[0].grad.shape == tensors[0].shape
    first = torch.randn(0, 2, 4, 5, 8, requires_grad=True)
    scores = ops.na_qk(first, first, kernel_size=3, backend="torch")
    mixed = ops.na_av(scores, first, kernel_size=3, backend="torch")
    assert scores.shape == (0, 2, 4, 5, 9) and mixed.shape == first.shape
    mixed.sum().backward()


def test_merge_is_one_softmax():
    query, key, value = (torch.randn(1, 6, 7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    more = [torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    window = {"kernel_size": 3, "return_lse": True}
    whole, lse = ops.neighborhood_attention(
        query, key, value, additional_keys=more[0], additional_values=more[1], **window
    )
    near = ops.neighborhood_attention(query, key, value, **window)
    scores = torch.einsum("bxyhd,bmhd->bxyhm", query, more[0]) / 2
    far = torch.einsum("bxyhm,bmhd->bxyhd", scores.softmax(-1), more[1]), scores.logsumexp(-1)
    merged, merged_lse = ops.merge_attentions([near[0], far[0]], [near[1], far[1]])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(whole)
    pairs = zip(*(torch.autograd.grad(x, [query, key, *more], upstream) for x in (merged, whole)), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


GRID = {name: torch.randn(1, 6, 8, 2, 4) for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 7}, "kernel_size 7 \\* dilation 1 = 7 exceeds the 6 tokens along height"),
        ({"kernel_size": 3, "dilation": (1, 3)}, "exceeds the 8 tokens along width; use a dilation of at most 2"),
        ({"kernel_size": 1}, "kernel_size along height must be >= 2"),
        ({"kernel_size": 3, "stride": (1, 4)}, "stride along width must be from 1 to kernel_size=3, got 4"),
        ({"kernel_size": 3, "dilation": 0}, "dilation along height must be >= 1"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one value or one for each of the 2 axes"),
        ({"kernel_size": 3.0}, "kernel_size must hold integers"),
        ({"kernel_size": 3, "is_causal": 1}, "is_causal must hold booleans"),
        ({"kernel_size": 4, "rpb": torch.randn(2, 7, 7)}, "rpb needs odd kernel_size.*height kernel_size 4 is even"),
        ({"kernel_size": 3, "stride": (1, 2), "rpb": torch.randn(2, 5, 5)}, "along width stride is 2"),
        ({"kernel_size": 3, "is_causal": True, "rpb": torch.randn(2, 5, 5)}, "along height it is causal"),
        ({"kernel_size": 3, "rpb": torch.randn(2, 5, 3)}, r"rpb must be floating-point \[2, 5, 5\]"),
        ({"kernel_size": 3, "additional_keys": torch.randn(1, 3, 2, 4)}, "must be given together"),
        (
            {
                "kernel_size": 3,
                "additional_keys": torch.randn(1, 3, 2, 4),
                "additional_values": torch.randn(1, 2, 2, 4),
            },
            "additional_values must be .* as many as",
        ),
        ({"kernel_size": 3, "key_mask": torch.ones(1, 8, 6, dtype=torch.bool)}, r"key_mask must be bool \[1, 6, 8\]"),
        (
            {"kernel_size": 3, "additional_key_mask": torch.ones(1, 3).bool()},
            "additional_key_mask needs additional_keys",
        ),
        ({"kernel_size": 3, "backend": "cutlass"}, "backend must be one of"),
        ({"kernel_size": 3, "key": torch.randn(1, 6, 8, 3, 4), "value": torch.randn(1, 6, 8, 3, 4)}, "multiple of"),
        ({"kernel_size": 3, "query": torch.randn(1, 8, 8, 2, 4)}, "agree in batch, space and head_dim"),
        ({"kernel_size": 3, "query": torch.randn(6, 8, 4)}, r"query must be \[batch, \*space, heads, head_dim\]"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ops.neighborhood_attention(**{**GRID, **options})


def test_unfused_refuses():
    query = torch.randn(1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match="weights must be .*9"):
        ops.na_av(torch.randn(1, 2, 6, 6, 8), query, kernel_size=3)
    with pytest.raises(ValueError, match="one shape"):
        ops.na_qk(query, query[..., :2], kernel_size=3)
    with pytest.raises(ValueError, match="rpb must be"):
        ops.na_qk(query, query, kernel_size=3, rpb=torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.na_qk(query, query, kernel_size=3, backend="triton")


def test_tiles_are_chosen_small_for_small_windows():
    windows = windows_of((56, 56), (7, 7), (1, 1), (1, 1), (False, False))
    tiles = torch_tiles.TiledGrid(windows, 2, 1, 0, torch.device("cpu"), torch.float32).tiles
    assert tiles.halo <= 4 * 49
