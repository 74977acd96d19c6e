"""The compiled CPU kernel under routed attention that is not causal: rows that choose blocks of keys one by one."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops import path_counts, reset_path_counts
from hf_attn.ops.hfattn_sparse.routed import op
from hf_attn.ops.hfattn_sparse.routed.reference import route_mask
from tests.budget import assert_as_good_as_eager
from tests.ops.test_native_kernel import made, written_out
from tests.ops.test_native_rows import CLOSE, DTYPES, compare_gradients

pytestmark = pytest.mark.needs_cxx
NATIVE = "routed_block_attention | torch: native"


@pytest.fixture
def native_path(native_kernel, monkeypatch):
    """The compiled kernel, forced."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chosen(tensors, block_size, share=0.4):
    """Bool routes. The first row reads nothing, block 0 is read by few rows and the last one by nearly all."""
    query, key = tensors[:2]
    routes = torch.rand(*query.shape[:3], -(-key.shape[2] // block_size)) < share
    routes[..., 0] &= torch.rand(query.shape[:3]) < 0.1
    routes[..., -1] |= torch.rand(query.shape[:3]) < 0.9
    routes[:, :, 0] = False
    return routes


def numbered(routes):
    """Int routes of bool ones: shuffled, padded with -1, and with a block that is named twice."""
    numbers = torch.where(routes, torch.arange(routes.shape[3]), -1)
    numbers = torch.cat([numbers, numbers[..., :1], torch.full_like(numbers[..., :1], -1)], -1)
    return numbers.gather(3, torch.rand(numbers.shape).argsort(-1))


def run(tensors, routes, block_size, scale=None):
    scale = tensors[0].shape[3] ** -0.5 if scale is None else scale
    return op.routed_block_attention(*tensors, routes, None, block_size, False, scale, False)


SHAPES = {
    # name: batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_size
    "whole blocks": (1, 4, 4, 256, 256, 64, 64, 64),
    "groups of two, a short block": (2, 4, 2, 200, 330, 64, 64, 128),
    "groups of three, Dv != D": (1, 6, 2, 300, 131, 64, 32, 24),
    "blocks longer than a chunk": (1, 2, 1, 150, 500, 32, 96, 200),
    "odd head dims": (2, 2, 1, 50, 70, 40, 24, 16),
    "one key block": (1, 3, 1, 70, 20, 64, 64, 32),
    "one key a block": (1, 2, 2, 40, 9, 32, 32, 1),
    "one query": (2, 4, 2, 1, 33, 16, 16, 8),
    **{f"{n} tokens": (1, 6, 2, n, n, 32, 32, 2) for n in range(1, 8)},
}


@pytest.mark.parametrize("form", ["bool", "int"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_routed(shape, dtype, form, native_path):
    *sizes, block_size = shape
    tensors, scale = made(*sizes, dtype), shape[5] ** -0.5
    routes = chosen(tensors, block_size)
    got = run(tensors, routes if form == "bool" else numbered(routes), block_size)
    assert path_counts() == {NATIVE: 1}
    seen = route_mask(routes, sizes[4], block_size)
    eager, exact = (written_out(*tensors, seen, scale, d) for d in (dtype, torch.float64))
    blind = ~seen.any(-1)
    assert torch.equal(got[1].isinf(), blind) and not got[0][blind].any()
    for ours, plain, oracle in zip(got, eager, exact, strict=True):
        ours, plain, oracle = (x[~blind] for x in (ours, plain, oracle))
        if ours.numel():
            assert_as_good_as_eager(ours, plain.to(ours.dtype), oracle, what=str(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_scores_far_apart(dtype, native_path):
    """Sums of earlier blocks shrink when a later block's scores are higher by far, and stay when they are lower."""
    tensors = made(1, 2, 2, 100, 160, 32, 32, dtype)
    tensors[0][:, 0] = tensors[0][:, 0].abs()
    tensors[1] *= torch.linspace(0.1, 12, 160)[:, None]
    tensors[1][:, 0] = tensors[1][:, 0].abs()
    tensors[1][:, 1] = tensors[1][:, 1].flip(1)
    routes = chosen(tensors, 32, 0.7)
    got = run(tensors, routes, 32)
    seen = route_mask(routes, 160, 32)
    eager, exact = (written_out(*tensors, seen, 32**-0.5, d) for d in (dtype, torch.float64))
    for ours, plain, oracle in zip(got, eager, exact, strict=True):
        ours, plain, oracle = (x[:, :, 1:][seen.any(-1)[:, :, 1:]] for x in (ours, plain, oracle))
        assert_as_good_as_eager(ours, plain.to(ours.dtype), oracle)


@pytest.mark.parametrize("sizes", [(5, 0), (0, 5), (0, 0)], ids=["no key", "no query", "nothing"])
def test_empty(sizes, native_path):
    tensors = made(2, 4, 2, *sizes, 16, 24, torch.float32)
    routes = torch.ones(2, 4, sizes[0], -(-sizes[1] // 2), dtype=torch.bool)
    out, lse = run(tensors, routes, 2)
    assert out.shape == (2, 4, sizes[0], 24) and not out.any() and bool((lse == float("-inf")).all())
    out, lse = run(tensors, torch.full((2, 4, sizes[0], 3), -1), 2)
    assert not out.any() and bool((lse == float("-inf")).all())


@pytest.mark.parametrize("form", ["bool", "int"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_gradients(dtype, form, native_path, monkeypatch):
    tensors = made(2, 6, 2, 150, 150, 32, 32, dtype)
    routes = chosen(tensors, 32)
    routes[:, :, 0, 1] = True  # the bf16 budget has no rows without keys
    routes = routes if form == "bool" else numbered(routes)
    compare_gradients(
        tensors, lambda *x: ops.routed_block_attention(*x, routes, block_size=32, causal=False), monkeypatch
    )
    assert path_counts()[NATIVE] == 1


def test_gradients_of_other_value_dims(native_path, monkeypatch):
    tensors = made(1, 4, 2, 90, 100, 32, 48, torch.float32)
    routes = chosen(tensors, 24)
    compare_gradients(
        tensors, lambda *x: ops.routed_block_attention(*x, routes, block_size=24, causal=False), monkeypatch
    )
    assert path_counts()[NATIVE] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_broken_keys(dtype, native_path):
    """NaN and infinities reach the rows that read their block, and no others."""
    tensors = made(1, 6, 2, 100, 100, 64, 64, dtype)
    routes = chosen(tensors, 24)  # the last block has 4 keys
    clean = run(tensors, routes, 24)
    tensors[1][:, 0, 30], tensors[2][:, 0, 98], tensors[2][:, 1, 75, 3] = float("nan"), float("inf"), float("nan")
    out, lse = run(tensors, routes, 24)
    keys = torch.stack([routes[:, :3, :, 1], routes[:, :3, :, 4], routes[:, 3:, :, 3]])
    spoilt = torch.cat([keys[0] | keys[1], keys[2]], 1)
    torch.testing.assert_close(out[~spoilt], clean[0][~spoilt], **CLOSE[dtype])
    assert torch.equal((~out.isfinite()).any(-1), spoilt)
    # A value spoils its own column alone, and no sum of weights.
    assert out[:, 3:, :, :3].isfinite().all()
    torch.testing.assert_close(lse[:, 3:], clean[1][:, 3:], **CLOSE[dtype])
    assert torch.equal(lse[:, :3].isnan(), keys[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_rows_with_nan(dtype, native_path):
    tensors = made(1, 2, 1, 70, 70, 32, 32, dtype)
    routes = chosen(tensors, 16)
    clean = run(tensors, routes, 16)[0]
    tensors[0][:, 0, 20] = float("nan")
    got = run(tensors, routes, 16)[0]
    assert got[0, 0, 20].isnan().all() == routes[0, 0, 20].any()
    got[0, 0, 20] = clean[0, 0, 20]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_threads(heads, dtype, native_path, threads):
    """Heads, and rows of a head where there are fewer, go to different threads: results are the same to the bit."""
    tensors = made(1, heads, 1, 700, 300, 32, 32, dtype)
    routes = chosen(tensors, 40)
    results = []
    for number in (1, 2, 5):
        threads(number)
        results.append(run(tensors, routes, 40))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_strides_of_hosts(native_path):
    tensors = made(2, 6, 2, 70, 90, 32, 32, torch.float32)
    routes = chosen(tensors, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for form in (routes.mT.contiguous().mT, numbered(routes), numbered(routes).int()):
        assert all(map(torch.equal, run(strided, form, 16), run(tensors, routes, 16)))


LAYOUTS = {
    "left padding": {"key_start": torch.tensor([0, 20]), "key_length": torch.tensor([60, 40])},
    "right padding": {"key_start": 0, "key_length": torch.tensor([60, 13])},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_padded(options, native_path):
    """Padded rows give what each row gives alone; keys of the padding may hold anything."""
    tensors = made(2, 4, 2, 60, 60, 32, 32, torch.float32)
    routes = chosen(tensors, 16)
    start = torch.as_tensor(options["key_start"]).expand(2).tolist()
    rows = [slice(a, a + int(n)) for a, n in zip(start, options["key_length"], strict=True)]
    for number, row in enumerate(rows):
        outside = torch.ones(60, dtype=torch.bool)
        outside[row] = False
        for x in tensors[1:]:
            x[number][:, outside] = float("nan")
    got = ops.routed_block_attention(*tensors, routes, block_size=16, causal=False, **options)
    assert set(path_counts()) == {NATIVE}
    for number, row in enumerate(rows):
        one = slice(number, number + 1)
        blocks = -(-(row.stop - row.start) // 16)
        alone = [x[one, :, row] for x in tensors]
        want = ops.routed_block_attention(*alone, routes[one, :, row, :blocks], block_size=16, causal=False)
        torch.testing.assert_close(got[one, :, row], want)


@pytest.mark.parametrize("form", ["bool", "int"])
def test_custom_op(form, native_path):
    tensors = made(1, 4, 2, 40, 40, 16, 16, torch.float32)
    routes = chosen(tensors, 8)
    routes = routes if form == "bool" else numbered(routes)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(op.routed_block_attention, (*leaves, routes, None, 8, False, 0.3, False))
    assert NATIVE in path_counts()


def test_where_the_kernel_is_taken(native_kernel, monkeypatch):
    """Calls that are neither causal nor tiny nor dense, with heads that it is fast with."""

    def taken(length, dtype, dim=64, causal=False, full=False):
        tensors = made(1, 2, 1, length, 400, dim, dim, dtype)
        routes = torch.ones(1, 2, length, 10, dtype=torch.bool) if full else chosen(tensors, 40)
        reset_path_counts()
        ops.routed_block_attention(*tensors, routes, block_size=40, causal=causal)
        return next(iter(path_counts())).removeprefix("routed_block_attention | torch: ")

    assert taken(400, torch.float32) == taken(9, torch.float32) == "native"
    assert taken(8, torch.float32) == "flash tiles"
    assert taken(400, torch.bfloat16, dim=40) == "flash tiles"
    assert taken(400, torch.float32, full=True) == "dense"
    assert taken(400, torch.float32, causal=True) in ("gathered", "masked tiles")
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert taken(400, torch.float32) == "flash tiles"
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    assert taken(2, torch.float32) == taken(400, torch.float32, full=True) == "native"
    with pytest.raises(RuntimeError, match="native cannot run this call: .* no compiled kernel for causal calls"):
        taken(400, torch.float32, causal=True)
    with pytest.raises(RuntimeError, match=r"cannot run this call: it takes float32 and bfloat16, got torch\.float16"):
        taken(2, torch.float16)


def test_a_mechanism_that_chooses_can_be_forced(native_kernel, monkeypatch):
    """Choosing blocks has no form of its own in the kernel and runs in torch beside it."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    query, key, value = (torch.randn(1, 2, 64, 32) for _ in range(3))
    chosen = ops.select_pooled_routes(query, key, torch.arange(64) // 16, block_size=16, top_k=2)
    ops.routed_block_attention(query, key, value, chosen, block_size=16, causal=False)
    assert path_counts()["routed_block_attention | torch: native"] == 1
