"""The compiled CPU kernel under ops whose rows are picked one by one: head-routed and document attention."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops import path_counts, reset_path_counts
from hf_attn.ops.documents import _table
from hf_attn.ops.head_routed import routes_dense
from hf_attn.ops.hfattn_sparse.documents import op as documents_op
from hf_attn.ops.hfattn_sparse.documents import reference as documents_reference
from hf_attn.ops.hfattn_sparse.head_routed import op
from hf_attn.ops.hfattn_sparse.masked import causal_mask
from tests.budget import assert_as_good_as_eager
from tests.ops.test_native_kernel import made, written_out

pytestmark = pytest.mark.needs_cxx
DTYPES = [torch.float32, torch.bfloat16]
# Rows that are done again are rounded less than they were.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.02, "atol": 0.01}}
HEADS, DOCUMENTS = "head_routed_attention | torch: native", "document_attention | torch: native"


@pytest.fixture
def native_path(native_kernel, monkeypatch):
    """The compiled kernel, forced."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")


def choice(batch, heads, length):
    """Head 0 by all tokens, the last by none where there are three or more, the others by some."""
    chosen = torch.rand(batch, heads, length) < 0.6
    chosen[:, 0] = True
    if heads > 2:
        chosen[:, -1] = False
    return chosen


SHAPES = {
    # name: batch, heads, kv_heads, q_len, k_len, dim, value_dim
    "groups of three": (1, 9, 3, 300, 300, 64, 64),
    "groups of two, Dv != D": (2, 4, 2, 130, 130, 32, 64),
    "no groups": (1, 3, 3, 200, 200, 128, 128),
    "one key head": (1, 8, 1, 65, 65, 64, 32),
    "odd head dims": (2, 4, 2, 70, 70, 40, 24),
    "behind a cache": (1, 6, 2, 40, 333, 64, 64),
    "more queries than keys": (2, 4, 2, 90, 40, 64, 64),
    "one query": (2, 4, 2, 1, 33, 16, 16),
    **{f"{n} tokens": (1, 6, 2, n, n, 32, 32) for n in range(1, 8)},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_head_routed(shape, dtype, causal, native_path):
    tensors, scale = made(*shape, dtype), shape[-2] ** -0.5
    heads = choice(shape[0], shape[1], shape[3])
    got = op.head_routed_attention(*tensors, heads, None, causal, scale, False)
    assert path_counts() == {HEADS: 1}
    seen = heads[..., None] & causal_mask(*shape[3:5], "cpu") if causal else heads[..., None]
    eager, exact = (written_out(*tensors, seen, scale, d) for d in (dtype, torch.float64))
    assert got[0].transpose(1, 2).is_contiguous() and got[1].is_contiguous()
    blind = exact[1].isinf()
    for ours, plain, oracle in zip(got, eager, exact, strict=True):
        ours, plain, oracle = (x[~blind] for x in (ours, plain, oracle))
        assert_as_good_as_eager(ours, plain.to(ours.dtype), oracle, what=str(shape))
    assert not got[0][blind].any() and bool((got[1][blind] == float("-inf")).all())


@pytest.mark.parametrize("sizes", [(5, 0), (0, 5), (0, 0)], ids=["no key", "no query", "nothing"])
def test_empty_head_routed(sizes, native_path):
    for causal in (True, False):
        tensors = made(2, 4, 2, *sizes, 16, 24, torch.float32)
        out, lse = op.head_routed_attention(*tensors, choice(2, 4, sizes[0]), None, causal, 0.25, False)
        assert out.shape == (2, 4, sizes[0], 24) and not out.any() and bool((lse == float("-inf")).all())


def gradients(tensors, call):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = call(*leaves)
    weight = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum() + (out[..., :1] ** 2).sum(), leaves)


def compare_gradients(tensors, call, monkeypatch, slack=3.0):
    """Native forward with torch's backward against the reference."""
    got = gradients(tensors, call)
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    eager, exact = gradients(tensors, call), gradients([x.double() for x in tensors], call)
    for ours, plain, oracle in zip(got, eager, exact, strict=True):
        assert_as_good_as_eager(ours, plain, oracle, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_gradients_of_head_routed(dtype, native_path, monkeypatch):
    heads = choice(2, 6, 150)
    compare_gradients(
        made(2, 6, 2, 150, 150, 32, 32, dtype), lambda *x: ops.head_routed_attention(*x, heads), monkeypatch
    )
    assert path_counts()[HEADS] == 1


LAYOUTS = {
    "left padding": {"key_start": torch.tensor([0, 20]), "key_length": torch.tensor([60, 40])},
    "right padding": {"key_start": 0, "key_length": torch.tensor([60, 13])},
    "an empty row": {"key_start": 0, "key_length": torch.tensor([60, 0])},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_padded_head_routed(options, native_path):
    """Padded rows give what each row gives alone; keys of the padding may hold anything."""
    tensors, heads = made(2, 4, 2, 60, 60, 32, 32, torch.float32), choice(2, 4, 60)
    start = torch.as_tensor(options["key_start"]).expand(2).tolist()
    rows = [slice(a, a + int(n)) for a, n in zip(start, options["key_length"], strict=True)]
    for number, row in enumerate(rows):
        outside = torch.ones(60, dtype=torch.bool)
        outside[row] = False
        for x in tensors[1:]:
            x[number][:, outside] = float("nan")
    got = ops.head_routed_attention(*tensors, heads, **options)
    assert set(path_counts()) == {HEADS}
    for number, row in enumerate(rows):
        alone = [x[number : number + 1, :, row] for x in (*tensors, heads)]
        torch.testing.assert_close(got[number : number + 1, :, row], ops.head_routed_attention(*alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_broken_keys_of_head_routed(dtype, native_path):
    """NaN and infinities reach the rows that see them, and no others, near as these may be."""
    tensors, heads = made(1, 6, 2, 100, 100, 64, 64, dtype), choice(1, 6, 100)
    clean = op.head_routed_attention(*tensors, heads, None, True, 0.125, False)
    tensors[1][:, 0, 70], tensors[2][:, 0, 75], tensors[2][:, 1, 40, 3] = float("nan"), float("inf"), float("nan")
    out, lse = op.head_routed_attention(*tensors, heads, None, True, 0.125, False)
    for own, first in ((slice(0, 3), 70), (slice(3, 6), 40)):
        before, after = slice(None, first), slice(first, None)
        for got, want in ((out, clean[0]), (lse, clean[1])):
            torch.testing.assert_close(got[:, own, before], want[:, own, before], **CLOSE[dtype])
        spoilt = out[:, own, after].isnan().any(-1)
        assert torch.equal(spoilt, heads[:, own, after])
    # A value spoils its own column alone, and no sum of weights.
    assert out[:, 3:, 40:, :3].isfinite().all()
    torch.testing.assert_close(lse[:, 3:], clean[1][:, 3:], **CLOSE[dtype])


def test_strides_of_hosts(native_path):
    tensors, heads = made(2, 6, 2, 70, 70, 32, 32, torch.float32), choice(2, 6, 70)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*tensors, heads)]
    assert torch.equal(ops.head_routed_attention(*strided), ops.head_routed_attention(*tensors, heads))


def test_custom_ops(native_path):
    tensors, heads = made(1, 4, 2, 40, 40, 16, 16, torch.float32), choice(1, 4, 40)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(op.head_routed_attention, (*leaves, heads, None, True, 0.3, False))
    table = _table(TokenLayout.documents(torch.arange(4).repeat_interleave(10)[None]), tensors[0])
    torch.library.opcheck(documents_op.document_attention, (*leaves, table, 0.5))
    assert set(path_counts()) >= {HEADS, DOCUMENTS}


def test_where_the_kernel_is_taken(native_kernel, monkeypatch):
    """Long calls take it where dense attention ran without it; training, decoding and dims it is slow with do not."""

    def taken(length, dtype, dim=64, k_len=None, grad=False):
        tensors = made(1, 9, 3, length, k_len or length, dim, dim, dtype)
        tensors[0].requires_grad_(grad)
        reset_path_counts()
        ops.head_routed_attention(*tensors, heads[:, :, :length])
        return next(iter(path_counts()))

    heads = torch.ones(1, 9, 400, dtype=torch.bool)
    heads[:, 8] = False
    assert taken(400, torch.float32) == HEADS
    assert taken(100, torch.float32).endswith("dense")
    assert taken(400, torch.float32, grad=True).endswith("dense")
    assert taken(2, torch.float32, k_len=4000).endswith("torch")
    assert taken(400, torch.bfloat16, dim=40).endswith("dense")
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    assert taken(400, torch.float32).endswith("torch")
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    assert taken(2, torch.float32, k_len=400) == HEADS
    with pytest.raises(RuntimeError, match=r"cannot run this call: it takes float32 and bfloat16, got torch\.float16"):
        taken(2, torch.float16)


def test_dense_where_nothing_is_built(monkeypatch):
    tensors, heads = made(1, 9, 3, 400, 400, 16, 16, torch.float32), torch.ones(1, 9, 400, dtype=torch.bool)
    assert routes_dense(*tensors, heads)
    monkeypatch.setenv("HF_ATTN_BACKEND", "native")
    with pytest.raises(RuntimeError, match="the kernel is not built"):
        ops.head_routed_attention(*tensors, heads)


LENGTHS = {
    "M1": [5],
    "M2": [4, 3],
    "M3": [3, 1, 2],
    "M10": [6, 3, 7, 2, 1, 9, 4, 4, 5, 3],
    "equal": [64] * 4,
    "long": [40, 33, 150, 70, 90],
}


def layout_of(lengths: list[int]) -> TokenLayout:
    """Three rows: padded right, left, and within the segments."""
    flat = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    gaps = torch.tensor([-1, -1])
    rows = [
        torch.cat([flat, gaps]),
        torch.cat([gaps, flat]),
        torch.cat([flat[:2], gaps[:1], flat[2:-1], gaps[:1], flat[-1:]]),
    ]
    return TokenLayout.documents(torch.stack(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(9, 3), (4, 2), (3, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_documents(lengths, heads, dtype, native_path):
    layout = layout_of(lengths)
    tensors = made(3, *heads, layout.q_len, layout.q_len, 32, 64 if heads == (9, 3) else 32, dtype)
    got = ops.document_attention(*tensors, tokens=layout)
    assert path_counts() == {DOCUMENTS: 1}
    table = _table(layout, tensors[0])
    seen, real = documents_reference.visible(table), (table[:, 0] >= 0)
    eager, exact = (written_out(*tensors, seen, 32**-0.5, d)[0].transpose(1, 2)[real] for d in (dtype, torch.float64))
    assert_as_good_as_eager(got.transpose(1, 2)[real], eager.to(dtype), exact, what=str(lengths))
    assert not got.transpose(1, 2)[~real].any()


def test_woven_documents(native_path):
    """Slots of a document need not lie side by side."""
    segments = torch.tensor([[0, 0, 1, 1, 2, -1, 1, 2, 2, 1, 1, 3, 3], [-1, 0, 0, 2, 1, 2, 1, 2, -1, 3, 3, 3, -1]])
    layout = TokenLayout.documents(segments)
    tensors = made(2, 6, 2, 13, 13, 16, 24, torch.float32)
    table = _table(layout, tensors[0])
    exact = documents_reference.forward(*(x.double() for x in tensors), table, 0.25)
    got = ops.document_attention(*tensors, tokens=layout)
    assert_as_good_as_eager(got, documents_reference.forward(*tensors, table, 0.25), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_gradients_of_documents(dtype, native_path, monkeypatch):
    layout = layout_of(LENGTHS["long"])
    tensors = made(3, 6, 2, layout.q_len, layout.q_len, 32, 32, dtype)
    compare_gradients(tensors, lambda *x: ops.document_attention(*x, tokens=layout), monkeypatch)
    assert path_counts()[DOCUMENTS] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_broken_keys_of_documents(dtype, native_path):
    """NaN and infinities in one document reach its own later rows and the reader alone; in the padding nobody."""
    layout = TokenLayout.documents(torch.tensor([0] * 5 + [1] * 40 + [-1] * 3 + [2] * 50 + [3] * 4)[None])
    tensors = made(1, 6, 2, 102, 102, 32, 32, dtype)
    clean = ops.document_attention(*tensors, tokens=layout)
    tensors[1][:, :, 45:48] = tensors[2][:, :, 45:48] = float("nan")
    tensors[1][:, :, 20], tensors[2][:, 0, 25] = float("nan"), float("inf")
    got = ops.document_attention(*tensors, tokens=layout)
    spoilt = torch.zeros(102, dtype=torch.bool)
    spoilt[20:45] = spoilt[98:] = True
    assert torch.equal(got.isnan().all(-1)[0], spoilt.expand(6, 102))
    torch.testing.assert_close(got[:, :, ~spoilt], clean[:, :, ~spoilt], **CLOSE[dtype])


def test_documents_without_tokens(native_path):
    nothing = TokenLayout.documents(torch.full((2, 7), -1))
    tensors = made(2, 4, 2, 7, 7, 16, 16, torch.float32)
    assert not ops.document_attention(*tensors, tokens=nothing).any()
    none = TokenLayout.documents(torch.zeros(2, 0, dtype=torch.long))
    assert ops.document_attention(*(x[:, :, :0] for x in tensors), tokens=none).shape == (2, 4, 0, 16)


def test_where_documents_take_it(native_kernel):
    tokens = TokenLayout.documents(torch.arange(4).repeat_interleave(20)[None])
    for dtype, dim, path in (
        (torch.float32, 40, "torch: native"),
        (torch.bfloat16, 40, "torch"),
        (torch.float16, 64, "torch"),
    ):
        reset_path_counts()
        ops.document_attention(*made(1, 4, 2, 80, 80, dim, dim, dtype), tokens=tokens)
        assert path_counts() == {f"document_attention | {path}": 1}
