"""Paged decoding ops: the torch path against the reference, choices among pages, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from hf_attn import ops
from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.ops.hfattn_sparse.paged import Pages
from tests.budget import assert_as_good_as_eager


def storage(x: torch.Tensor, name: str | None) -> Pages:
    """`[B, H, n, P, D]` in a format."""
    scale = absmax_scale(x) if name == "int8-per-tensor" else None
    return KVFormat(name).encode(x.flatten(2, 3), scale).map(lambda t: t[:, :, 0].unflatten(2, x.shape[2:4]))


def case(batch=3, heads=2, group=3, pages=9, size=8, dim=16, value_dim=16, dtype=torch.float32, per_head=True, seed=0):
    """Query, pages, lists of unequal length and row lengths; one row is empty, one ends inside a page."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * group, dim, generator=generator)
    key = torch.randn(batch, heads, pages, size, dim, generator=generator)
    value = torch.randn(batch, heads, pages, size, value_dim, generator=generator)
    length = torch.tensor([pages * size, 3 * size + 5, 0])[:batch]
    lists = torch.full((batch, heads * (group if per_head else 1), 5), -1)
    for row in range(batch):
        last = max(int(length[row]) - 1, 0) // size
        for head in range(lists.shape[1]):
            order = torch.randperm(last, generator=generator)[: 4 - head % 2]
            chosen = torch.cat([order, torch.tensor([last])])
            lists[row, head, : len(chosen)] = chosen
    return query.to(dtype), key.to(dtype), value.to(dtype), lists, length


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("name", [None, "int8", "int4", "int8-per-tensor"])
@pytest.mark.parametrize("value_dim", [16, 10])
def test_torch_path_matches_reference(value_dim, name, per_head, current, monkeypatch):
    query, key, value, lists, length = case(per_head=per_head, value_dim=value_dim)
    newest = None
    if current:
        newest = (torch.randn(3, 2, 16), torch.randn(3, 2, value_dim))
    arguments = (query, storage(key, name), storage(value, name), lists)
    results = {}
    for backend in ("reference", "torch"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        results[backend] = ops.paged_attention(*arguments, length=length, current=newest)
    double = None
    if name is None:
        double = ops.paged_attention(query.double(), *arguments[1:], length=length, current=newest)
    torch.testing.assert_close(results["torch"], results["reference"], rtol=0, atol=5e-6)
    if double is not None:
        assert_as_good_as_eager(results["torch"], results["reference"], double, slack=4)
    assert (results["torch"][2] == 0).all()
    assert ops.path_counts()["paged_attention | torch"] >= 1


@pytest.mark.parametrize("window", [None, (8, 20), (0, 1)])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("piece", [200, 1 << 17])
def test_rings_and_windows(piece, current, ring, window, monkeypatch):
    """Against attention to the tokens that numbers, window and lists leave, one by one."""
    from hf_attn.ops.hfattn_sparse.paged import torch_path

    monkeypatch.setattr(torch_path, "PIECE", piece)
    query, key, value, lists, length = case(per_head=False, value_dim=10)
    numbers = torch.arange(72).expand(3, 72)
    if ring:
        numbers = torch.stack([torch.randperm(72) for _ in range(3)])
        numbers[:, ::7] = -1
    newest = (torch.randn(3, 2, 16), torch.randn(3, 2, 10)) if current else None
    expected = torch.zeros(3, 6, 10)
    for row in range(3):
        for head in range(6):
            keys, values = [], []
            for page in lists[row, head // 3].tolist():
                for place in range(8) if page >= 0 else ():
                    number = int(numbers[row, page * 8 + place])
                    near = window is None or number < window[0] or number >= length[row] - window[1]
                    own = current and number == length[row] - 1
                    if 0 <= number < length[row] and near and not (ring and own):
                        keys.append(newest[0][row, head // 3] if own else key[row, head // 3, page, place])
                        values.append(newest[1][row, head // 3] if own else value[row, head // 3, page, place])
            if ring and current and length[row] > 0:
                keys.append(newest[0][row, head // 3])
                values.append(newest[1][row, head // 3])
            if keys:
                weights = (torch.stack(keys) @ query[row, head] / 4).softmax(0)
                expected[row, head] = weights @ torch.stack(values)
    options = {"length": length, "current": newest, "slots": numbers.view(3, 9, 8) if ring else None, "window": window}
    for backend in ("reference", "torch"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        got = ops.paged_attention(query, Pages(key), Pages(value), lists, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("piece", [1, 200, 10_000])
def test_any_piece_size_gives_the_same(piece, monkeypatch):
    from hf_attn.ops.hfattn_sparse.paged import torch_path

    query, key, value, lists, length = case()
    expected = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    monkeypatch.setattr(torch_path, "PIECE", piece)
    got = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("name", [None, "int4"])
def test_lists_copied_as_one_give_the_same(name, current, monkeypatch):
    """The lists of the query heads of a KV head, merged or one by one, against the reference."""
    from hf_attn.ops.hfattn_sparse.paged import torch_path

    query, key, value, lists, length = case(seed=3)
    newest = (torch.randn(3, 2, 16), torch.randn(3, 2, 16)) if current else None
    arguments = (query, storage(key, name), storage(value, name), lists)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    expected = ops.paged_attention(*arguments, length=length, current=newest)
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    merged, member = torch_path.merged_lists(lists, 2, 9)
    assert merged.shape[2] < 3 * lists.shape[2] and member.sum() == (lists >= 0).sum()
    for share in (0.0, 1.0):
        monkeypatch.setattr(torch_path, "SHARED", share)
        got = ops.paged_attention(*arguments, length=length, current=newest)
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_a_page_of_another_head_cannot_reach_a_result(monkeypatch):
    """Heads share a copy, but not what is wrong with a page that only one of them reads."""
    from hf_attn.ops.hfattn_sparse.paged import torch_path

    monkeypatch.setattr(torch_path, "SHARED", 1.0)
    query, key, value, _, length = case(batch=1, heads=1)
    lists = torch.tensor([[[0, 1, 8], [1, 2, 8], [1, 2, 8]]])
    expected = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    for poison in (float("nan"), float("inf")):
        broken = value.clone()
        broken[0, 0, 0] = poison
        got = ops.paged_attention(query, Pages(key), Pages(broken), lists, length=length)
        assert not got[0, 0].isfinite().all()
        torch.testing.assert_close(got[0, 1:], expected[0, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, monkeypatch):
    query, key, value, lists, length = case(dtype=dtype)
    got = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    wide = [t.double() for t in (query, key, value)]
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    oracle = ops.paged_attention(wide[0], Pages(wide[1]), Pages(wide[2]), lists, length=length)
    assert_as_good_as_eager(got, eager, oracle)


def test_unlisted_pages_and_later_tokens_are_not_read():
    query, key, value, lists, length = case(batch=2)
    expected = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    read = torch.zeros(2, 2, 10, dtype=torch.bool)
    read.scatter_(2, torch.where(lists < 0, 9, lists).unflatten(1, (2, 3)).amax(2), True)
    for head in range(6):
        read[:, head // 3].scatter_(1, torch.where(lists[:, head] < 0, 9, lists[:, head]), True)
    hidden = ~read[..., :9]
    assert hidden.any()
    key, value = (torch.where(hidden[..., None, None], float("nan"), x) for x in (key, value))
    got = ops.paged_attention(query, Pages(key), Pages(value), lists, length=length)
    assert torch.equal(got, expected)


def test_example_of_the_paper():
    """Figure 8 of LServe: logical scores 23 and 40, the page's score 40."""
    query = torch.tensor([1.0, -2, 2, -2, 1, 1, 1, -3])
    high = torch.tensor([[2.0, 3, 2, 8, 4, 5, 2, 6], [4.0, 6, 3, 4, 2, 4, 5, 7]])
    low = torch.tensor([[-6.0, -1, -6, 1, -5, -6, -6, -2], [0.0, -2, -8, -3, -8, -7, -3, -3]])
    stats = torch.stack([high, low], 1)[None, None, None]
    assert ops.page_scores(query[None, None], stats, logical=True)[0, 0, 0].tolist() == [23.0, 40.0]
    assert ops.page_scores(query[None, None], stats)[0, 0].tolist() == [40.0]


def test_selection_among_ties_takes_later_pages():
    scores = torch.tensor([[[5.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0]]])
    chosen = ops.select_pages(scores, torch.tensor([5]), count=3)
    assert sorted(chosen[0, 0].tolist()) == [0, 3, 4]
    equal = ops.select_pages(torch.zeros(1, 2, 6), torch.tensor([6]), count=4)
    assert [sorted(row) for row in equal[0].tolist()] == [[2, 3, 4, 5]] * 2


def test_selection_of_unequal_rows():
    scores = torch.randn(3, 2, 10)
    last = torch.tensor([9, 2, 0])
    chosen = ops.select_pages(scores, last, count=4)
    assert chosen.shape == (3, 2, 4)
    for row in range(3):
        for head in range(2):
            got = [page for page in chosen[row, head].tolist() if page >= 0]
            best = scores[row, head, : last[row]].argsort(descending=True)[:4].tolist()
            assert sorted(got) == sorted(best)
    assert ops.select_pages(scores, last, count=0).shape == (3, 2, 0)


def test_nan_keys_do_not_capture_the_selection():
    scores = torch.tensor([[[float("nan"), 2.0, 3.0, 1.0]]])
    assert sorted(ops.select_pages(scores, torch.tensor([4]), count=2)[0, 0].tolist()) == [1, 2]


def test_bad_input():
    query, key, value, lists, length = case()
    pages = Pages(key), Pages(value)
    cases = [
        (lambda: ops.page_statistics(key[0], page_size=8, logical_page_size=4)[0], None),
        (lambda: ops.page_statistics(key[:, :, 0], page_size=8, logical_page_size=3), "page_size must be a multiple"),
        (lambda: ops.page_statistics(key[0, 0], page_size=8, logical_page_size=4), "key must be floating"),
        (lambda: ops.page_scores(query[0], key), "query must be [batch, heads, D]"),
        (lambda: ops.select_pages(torch.zeros(1, 2, 3), torch.tensor([1.0]), count=1), "last an integer tensor"),
        (lambda: ops.paged_attention(query[:, :5], *pages, lists, length=length), "query must be [3, a multiple of 2"),
        (lambda: ops.paged_attention(query, *pages, lists[:, :4], length=length), "pages must be [3, 2 or 6, W]"),
        (lambda: ops.paged_attention(query, *pages, lists, length=length[:2]), "length must be an integer tensor [3]"),
        (lambda: ops.paged_attention(query, pages[0], Pages(value[:, :, :4]), lists, length=length), "pages differ"),
        (lambda: ops.paged_attention(query, *pages, lists, length=length, slots=lists),
         "slots must be an integer tensor [3, 9, 8]"),
        (lambda: ops.paged_attention(query, *pages, lists, length=length, window=(1, -1)),
         "window[1] must be an integer"),
        (lambda: ops.sink_window_attention(query[:, :, None], query[:, :, None], query[:, :, None], sinks=-1, window=3),
         "sinks must be an integer >= 0"),
        (lambda: ops.gated_streaming_attention(*(key[:, :, 0],) * 3, torch.ones(3), sinks=1, window=2),
         "one gate a KV head, [2]"),
    ]  # fmt: skip
    for call, message in cases:
        if message is None:
            call()
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_gates_are_differentiable():
    query = torch.randn(1, 4, 12, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 12, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 12, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: ops.gated_streaming_attention(*t, sinks=2, window=3), (query, key, value, alpha), fast_mode=True
    )
    teacher = torch.randn(1, 4, 12, 6, dtype=torch.float64)
    out = ops.gated_streaming_attention(query, key, value, torch.ones(2).double(), sinks=2, window=3, full=teacher)
    assert torch.equal(out, teacher)
