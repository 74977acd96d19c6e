"""What a token attends to does not depend on how its sequence is laid out: padding, packing, chunks, cache, order."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.ops import dense_attention, path_counts
from tests.cases import CASES
from tests.matrix.build import run, tensors

pytestmark = [
    pytest.mark.usefixtures("sparse_path"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.id),
]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def assert_sparse_ran() -> None:
    """The torch path of a sparse op was really taken."""
    ran = [name for name in path_counts() if "attention |" in name and "torch" in name]
    assert ran, f"no sparse op ran: {path_counts()}"


def separate(case, query, key, value, lengths):
    """Output of every row's first `lengths[b]` tokens, one run each."""
    return [
        run(case, query[b : b + 1, :, :n], key[b : b + 1, :, :n], value[b : b + 1, :, :n])[0]
        for b, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(case, side):
    lengths, total = [70, 5, 33, 1], 70
    query, key, value = tensors(batch=4, q_len=total)
    expected = separate(case, query, key, value, lengths)
    starts = [total - n if side == "left" else 0 for n in lengths]
    rows = [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    padded = [torch.full_like(t, float("nan")) for t in (query, key, value)]
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        for target, source in zip(padded, (query, key, value), strict=True):
            target[b, :, row] = source[b, :, :n]
    tokens = TokenLayout.padded(torch.tensor(starts), torch.tensor(lengths), total, total)
    out = run(case, *padded, tokens=tokens)
    for b, row in enumerate(rows):
        torch.testing.assert_close(out[b, :, row], expected[b], **TOLERANCE)
    real = torch.zeros(4, total, dtype=torch.bool)
    for b, row in enumerate(rows):
        real[b, row] = True
    assert (out.transpose(1, 2)[~real] == 0).all()
    assert_sparse_ran()


def test_hole_in_the_middle_equals_compact(case):
    query, key, value = tensors(batch=2, q_len=60)
    keep = torch.ones(2, 60, dtype=torch.bool)
    keep[0, 20:29] = False
    keep[1, :3] = False
    segment = torch.where(keep, 0, -1)
    position = torch.arange(60).expand(2, -1)
    index = torch.stack([torch.cat([segment] * 2, 1), torch.cat([position] * 2, 1)], 1).int()
    out = run(case, query, key, value, tokens=TokenLayout(2, 60, 60, index))
    for b in range(2):
        compact = run(case, *(t[b : b + 1, :, keep[b]] for t in (query, key, value)))
        torch.testing.assert_close(out[b : b + 1, :, keep[b]], compact, **TOLERANCE)


def test_packed_equals_separate(case):
    lengths = [40, 1, 29, 16, 33]
    query, key, value = tensors(batch=1, q_len=sum(lengths) + 4)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = TokenLayout.packed(cu, cu, query.shape[2], query.shape[2])
    out = run(case, query, key, value, tokens=tokens)
    for start, end in zip(cu[:-1], cu[1:], strict=True):
        alone = run(case, *(t[:, :, start:end] for t in (query, key, value)))
        torch.testing.assert_close(out[:, :, start:end], alone, **TOLERANCE)
    assert (out[:, :, sum(lengths) :] == 0).all()
    assert_sparse_ran()


@pytest.mark.parametrize("chunk", [7, 16, 19, 64])
def test_chunked_prefill_equals_whole(case, chunk):
    """Where a setting runs chunks behind a cache densely, their rows are the dense ones."""
    query, key, value = tensors(q_len=93)
    whole = run(case, query, key, value)
    if case.dense_chunks:
        first = min(chunk, 93)
        whole = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        whole[:, :, :first] = run(case, query[:, :, :first], key[:, :, :first], value[:, :, :first])
    for start in range(0, 93, chunk):
        end = min(start + chunk, 93)
        rows = run(case, query[:, :, start:end], key[:, :, :end], value[:, :, :end])
        torch.testing.assert_close(rows, whole[:, :, start:end], **TOLERANCE)


def test_chunk_of_padded_rows_equals_whole(case):
    lengths, total = [50, 23, 37], 50
    query, key, value = tensors(batch=3, q_len=total)
    starts = torch.tensor([total - n for n in lengths])
    tokens = TokenLayout.padded(starts, torch.tensor(lengths), total, total)
    if case.dense_chunks:
        call = AttentionCall(query, key, value, query.shape[-1] ** -0.5, True, tokens)
        whole = dense_attention(call).masked_fill((tokens.index[:, 0, :total] < 0)[:, None, :, None], 0)
    else:
        whole = run(case, query, key, value, tokens=tokens)
    tail = TokenLayout.padded(starts, torch.tensor(lengths), 9, total)
    rows = run(case, query[:, :, -9:], key, value, tokens=tail)
    torch.testing.assert_close(rows, whole[:, :, -9:], **TOLERANCE)


def test_decode_equals_full_forward(case):
    """Token by token behind a cache; where a setting decodes densely, the row is the dense one."""
    query, key, value = tensors(q_len=53)
    whole = run(case, query, key, value)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for position in (0, 1, 15, 16, 17, 31, 52):
        end = position + 1
        row = run(case, query[:, :, position:end], key[:, :, :end], value[:, :, :end])
        expected = dense if case.dense_decode else whole
        torch.testing.assert_close(row, expected[:, :, position:end], **TOLERANCE)


def test_static_cache_decode(case):
    """Slots of a static cache that are not filled yet hold garbage and must not be read."""
    query, key, value = tensors(batch=2, q_len=1, k_len=64)
    expected = run(case, query, key[:, :, :41], value[:, :, :41])
    key[:, :, 41:], value[:, :, 41:] = float("nan"), float("nan")
    segment = torch.zeros(2, 65, dtype=torch.int32)
    position = torch.cat([torch.tensor([40]), torch.arange(64)]).expand(2, -1).int()
    if case.dense_decode:
        key, value = key.nan_to_num(0), value.nan_to_num(0)
    out = run(case, query, key, value, tokens=TokenLayout(2, 1, 64, torch.stack([segment, position], 1)))
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_causality(case):
    query, key, value = tensors(q_len=61)
    before = run(case, query, key, value)
    changed = [t.clone() for t in (query, key, value)]
    first = 40 // case.block_size * case.block_size if case.selects_by_block else 40
    for t in changed:
        t[:, :, first:] = torch.randn_like(t[:, :, first:]) * 10
    torch.testing.assert_close(run(case, *changed)[:, :, :first], before[:, :, :first], **TOLERANCE)


def test_batch_order_does_not_matter(case):
    query, key, value = tensors(batch=3, q_len=40)
    order = torch.tensor([2, 0, 1])
    out = run(case, query, key, value)
    torch.testing.assert_close(run(case, query[order], key[order], value[order]), out[order], **TOLERANCE)


def test_row_without_any_real_token(case):
    query, key, value = (t.requires_grad_() for t in tensors(batch=2, q_len=20))
    tokens = TokenLayout.padded(torch.tensor([20, 0]), torch.tensor([0, 20]), 20, 20)
    out = run(case, query, key, value, tokens=tokens)
    out.sum().backward()
    assert (out[0] == 0).all() and out[1].isfinite().all()
    for t in (query, key, value):
        assert (t.grad[0] == 0).all() and t.grad.isfinite().all()
