"""Paged decoding by the Triton kernels is that of the reference: formats, lists, splits, rings, scores, statistics."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse.launch import forced_config, interpreting
from hf_attn.ops.hfattn_sparse.paged import Pages
from tests.budget import assert_as_good_as_eager
from tests.ops.test_paged import case, storage

pytest.importorskip("triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU or the interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [None, "int8", "int4", "int8-per-tensor"]


def to_device(x):
    if isinstance(x, Pages):
        return Pages(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in x))
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def draw(number: int) -> tuple[list, dict]:
    """A random call of `paged_attention`: rows of any length from 0 on, lists with gaps in any place."""
    pick, generator = random.Random(number), torch.Generator().manual_seed(number)
    heads, group = pick.choice([(1, 1), (2, 1), (1, 3), (2, 8), (1, 20)])
    batch, pages, size = pick.choice([1, 2]), pick.choice([1, 2, 5]), pick.choice([1, 3, 8, 16])
    dim, value_dim = pick.choice([8, 16, 24]), pick.choice([8, 16, 40])
    dtype = pick.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    tensors = [torch.randn(batch, heads, pages, size, d, generator=generator).to(dtype) for d in (dim, value_dim)]
    key, value = (storage(x, FORMATS[number % 4]) for x in tensors)
    length = torch.tensor([pick.choice([0, 1, 2, 7, pages * size]) for _ in range(batch)]).clamp(max=pages * size)
    lists = heads * (group if pick.random() < 0.5 else 1)
    rank = torch.rand(batch, lists, pages, generator=generator)
    chosen = torch.where(rank < 0.8, rank.argsort(-1), -1)
    chosen = torch.cat([chosen, torch.full_like(chosen[..., :1], -1)], -1)
    options = {"length": length, "scale": pick.choice([None, 0.3])}
    if pick.random() < 0.5:
        options["current"] = tuple(
            torch.randn(batch, heads, d, generator=generator).to(dtype) for d in (dim, value_dim)
        )
    if pick.random() < 0.4:
        slots = torch.stack([torch.randperm(pages * size, generator=generator) for _ in range(batch)])
        options["slots"] = slots.where(torch.rand(slots.shape, generator=generator) < 0.9, -1).view(batch, pages, size)
    if pick.random() < 0.4:
        options["window"] = (pick.choice([0, 3]), pick.choice([0, 1, 6]))
    query = torch.randn(batch, heads * group, dim, generator=generator).to(dtype)
    options = {k: tuple(map(to_device, v)) if k == "current" else to_device(v) for k, v in options.items()}
    return [to_device(x) for x in (query, key, value, chosen)], options


def compare(number: int, monkeypatch) -> None:
    arguments, options = draw(number)
    query, dtype = arguments[0], arguments[0].dtype
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager = ops.paged_attention(*arguments, **options)
    if "current" in options:
        options["current"] = tuple(x.double() for x in options["current"])
    wide = [x if x.bits else Pages(x.data.double()) for x in arguments[1:3]]
    oracle = ops.paged_attention(query.double(), *wide, arguments[3], **options)
    if "current" in options:
        options["current"] = tuple(x.to(dtype) for x in options["current"])
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.paged_attention(*arguments, **options)
    # Dequantised values of the oracle are rounded to fp32 too.
    floor = 1e-6 if dtype == torch.float32 else 0.0
    assert_as_good_as_eager(got, eager, oracle, slack=4, floor=floor, what=f"call {number}")


@pytest.mark.parametrize("number", range(24))
def test_random_calls(number, monkeypatch):
    compare(number, monkeypatch)
    assert path_counts()["paged_attention | triton"] == 1


@pytest.mark.parametrize("number", range(24, 32))
def test_random_calls_in_many_splits(number, monkeypatch):
    from hf_attn.ops.hfattn_sparse.paged import triton_path

    monkeypatch.setattr(triton_path, "_splits", lambda tokens, step, running: (step, max(-(-tokens // step), 1)))
    with forced_config(paged_attention={"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}):
        compare(number, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100, 250))
def test_many_random_calls(number, monkeypatch):
    with forced_config(**({"paged_attention": {"BLOCK_N": 16, "num_warps": 4}} if number % 2 else {})):
        compare(number, monkeypatch)


def test_what_is_not_listed_is_not_read(monkeypatch):
    """Unlisted pages, later tokens and the stored newest token hold NaN; a page number does not exist."""
    query, key, value, lists, length = (t[:2] for t in case(batch=2, per_head=False))
    expected = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length, current=newest(key, value))
    seen = torch.zeros(2, 2, 9, 8, dtype=torch.bool)
    for row in range(2):
        for head in range(2):
            seen[row, head, [page for page in lists[row, head].tolist() if page >= 0]] = True
        seen[row].flatten(1)[:, length[row] - 1 :] = False
    current = newest(key, value)
    key, value = (torch.where(seen[..., None], x, float("nan")) for x in (key, value))
    assert key.isnan().any() and lists.shape[2] == 5
    lists = torch.cat([lists, torch.full_like(lists[..., :1], 77)], -1)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    arguments = [to_device(x) for x in (query, Pages(key), Pages(value), lists)]
    got = ops.paged_attention(*arguments, length=to_device(length), current=tuple(map(to_device, current)))
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-6)


def newest(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key[:, :, 1, 3], value[:, :, 1, 3]


@pytest.mark.parametrize("strided", [False, True])
def test_strides(strided, monkeypatch):
    """Storage sliced out of a larger one, and a query and current token that are views of other layouts."""
    wide = torch.randn(2, 2, 12, 8, 16, device=DEVICE)
    pages = Pages(wide[:, :, 3:9] if strided else wide[:, :, 3:9].contiguous())
    query = torch.randn(2, 1, 4, 16, device=DEVICE).transpose(1, 2)[:, :, 0]
    lists = torch.arange(6, device=DEVICE).expand(2, 2, 6)
    options = {"length": torch.tensor([45, 20], device=DEVICE), "current": (wide[:, :, 0, 0], wide[:, :, 1, 1])}
    expected = ops.paged_attention(query, pages, pages, lists, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    torch.testing.assert_close(ops.paged_attention(query, pages, pages, lists, **options), expected)


def test_scales_of_sliced_storage(monkeypatch):
    x = torch.randn(1, 2, 6, 4, 16)
    stored = storage(x, "int8")
    part = to_device(stored.map(lambda t: t[:, :, 1:5]))
    assert not part.scale.is_contiguous()
    query, lists = torch.randn(1, 2, 16, device=DEVICE), torch.arange(4, device=DEVICE).expand(1, 2, 4)
    length = torch.tensor([15], device=DEVICE)
    expected = ops.paged_attention(query, part, part, lists, length=length)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    torch.testing.assert_close(ops.paged_attention(query, part, part, lists, length=length), expected)


# (batch, heads, tokens, D), page, logical page
SIZES = [((1, 1, 1, 8), 4, 2), ((2, 2, 37, 24), 12, 3), ((1, 3, 64, 16), 16, 16), ((2, 1, 7, 40), 64, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "page", "logical"), SIZES)
def test_statistics_and_scores(shape, page, logical, dtype, monkeypatch):
    key = torch.randn(shape, device=DEVICE).to(dtype)
    query = torch.randn(shape[0], shape[1] * 3, shape[3], device=DEVICE).to(dtype)
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        stats, count = ops.page_statistics(key, page_size=page, logical_page_size=logical)
        found[backend] = stats, count, ops.page_scores(query, stats), ops.page_scores(query, stats, logical=True)
        part = ops.page_scores(query, stats[:, :, :1])
        torch.testing.assert_close(part, found[backend][2][:, :, :1], rtol=1e-6, atol=1e-5)
    for exact in range(2):
        assert torch.equal(found["triton"][exact], found["torch"][exact])
    for scores in range(2, 4):
        torch.testing.assert_close(found["triton"][scores], found["torch"][scores], rtol=1e-6, atol=1e-5)
    assert path_counts()["page_scores | triton"] == 3 and path_counts()["page_statistics | triton"] == 1


def test_selections_agree(monkeypatch):
    """Same pages from both paths on random keys, and later pages first among exact ties."""
    key, query = torch.randn(2, 2, 200, 16, device=DEVICE), torch.randn(2, 8, 16, device=DEVICE)
    key[:, :, 64:] = key[:, :, :1].expand(-1, -1, 136, -1)
    chosen = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        stats, _ = ops.page_statistics(key, page_size=8, logical_page_size=4)
        scores = ops.page_scores(query, stats)
        assert (scores[:, :, 8:] == scores[:, :, 8:9]).all()
        chosen.append(ops.select_pages(scores, torch.tensor([24, 11], device=DEVICE), count=6).sort(-1).values)
    assert torch.equal(*chosen)


def test_nan_keys_give_nan_statistics_and_scores(monkeypatch):
    key = torch.randn(1, 1, 12, 8, device=DEVICE)
    key[0, 0, 5, 3] = float("nan")
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    stats, _ = ops.page_statistics(key, page_size=4, logical_page_size=2)
    assert stats.isnan().nonzero()[:, 2:].tolist() == [[1, 0, 0, 3], [1, 0, 1, 3]]
    assert ops.page_scores(torch.ones(1, 2, 8, device=DEVICE), stats).isnan().tolist() == [[[False, True, False]] * 2]


WINDOWS = [  # tokens, sinks, window
    (1, 0, 1), (3, 5, 1), (40, 5, 4), (75, 30, 20), (75, 1, 200), (100, 0, 33), (70, 70, 1),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["full", "cached", "longer", "padded", "packed"])
@pytest.mark.parametrize(("tokens", "sinks", "window"), WINDOWS)
def test_sinks_and_window(tokens, sinks, window, layout, monkeypatch):
    q_len = {"cached": max(tokens // 3, 1), "longer": tokens + 3}.get(layout, tokens)
    dtype = {"full": torch.float16, "cached": torch.bfloat16}.get(layout, torch.float32)
    batch = 1 if layout == "packed" else 2
    shapes = ((4, q_len, 16), (2, tokens, 16), (2, tokens, 24))
    tensors = [torch.randn(batch, *shape, device=DEVICE).to(dtype) for shape in shapes]
    options = {"sinks": sinks, "window": window}
    if layout == "padded":
        options["key_start"] = torch.tensor([tokens // 2, 0], device=DEVICE)
    if layout == "packed":
        options["cu_seqlens_q"] = torch.tensor([0, tokens // 3, tokens // 2, tokens], device=DEVICE)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager = ops.sink_window_attention(*tensors, **options)
    oracle = ops.sink_window_attention(*(t.double() for t in tensors), **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.sink_window_attention(*tensors, **options)
    assert_as_good_as_eager(got, eager, oracle, slack=4)
    assert path_counts()["sink_window_attention | triton"] == 1


def test_values_that_are_not_finite_reach_only_who_sees_them(monkeypatch):
    query, key, value = (torch.randn(1, 1, 80, 16, device=DEVICE) for _ in range(3))
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    expected = ops.sink_window_attention(query, key, value, sinks=3, window=10)
    value[0, 0, 40], key[0, 0, 40] = float("nan"), float("nan")
    got = ops.sink_window_attention(query, key, value, sinks=3, window=10)[0, 0]
    rows = torch.arange(80, device=DEVICE)
    hit = (rows >= 40) & (rows < 50)
    assert torch.equal(got.isnan().any(-1), hit)
    torch.testing.assert_close(got[~hit], expected[0, 0][~hit])


def test_gradients_of_sinks_and_window(monkeypatch):
    tensors = [torch.randn(1, h, 40, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2)]
    grads = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        out = ops.sink_window_attention(*tensors, sinks=3, window=7)
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_custom_ops_keep_the_rules():
    from hf_attn.ops.hfattn_sparse.paged import triton_op
    from hf_attn.ops.hfattn_sparse.windowed import triton_op as windowed

    key, query = torch.randn(2, 2, 20, 8, device=DEVICE), torch.randn(2, 4, 8, device=DEVICE)
    stats, _ = triton_op.page_statistics(key, 8, 4)
    torch.library.opcheck(triton_op.page_statistics, (key, 8, 4))
    for logical in (False, True):
        torch.library.opcheck(triton_op.page_scores, (query, stats, logical))
    pages = [to_device(storage(torch.randn(2, 2, 3, 4, 8), "int4")) for _ in range(2)]
    lists, length = torch.arange(3, device=DEVICE).expand(2, 4, 3), torch.tensor([9, 12], device=DEVICE)
    arguments = (query, *pages[0], *pages[1], lists, length, 0.5, None, None, None, 1, 4)
    torch.library.opcheck(triton_op.paged_attention, arguments)
    tensors = [torch.randn(1, h, 10, 8, device=DEVICE, requires_grad=True) for h in (2, 1, 1)]
    torch.library.opcheck(windowed.sink_window_attention, (*tensors, None, 1, 3, 0.5))
