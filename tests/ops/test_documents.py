"""document_attention and document_scores against dense attention under the mask of the specification."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.call import AttentionCall, TokenLayout
from hf_attn.mechanisms.blockrank import MECHANISM, BlockRankConfig, positions
from hf_attn.ops.hfattn_sparse.documents import op
from tests.budget import assert_as_good_as_eager

LENGTHS = {"M1": [5], "M2": [4, 3], "M3": [3, 1, 2], "M10": [6, 3, 7, 2, 1, 9, 4, 4, 5, 3], "equal": [4] * 6}
HEADS = [(9, 3), (8, 8), (32, 8), (3, 3)]


def layout_of(lengths: list[int]) -> TokenLayout:
    """Three rows: padded right, left, and between segments."""
    flat = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    gaps = torch.tensor([-1, -1])
    middle = [torch.cat([flat[:2], gaps, flat[2:]])]
    return TokenLayout.documents(torch.stack([torch.cat([flat, gaps]), torch.cat([gaps, flat]), *middle]))


def tensors(heads: tuple[int, int], length: int, value_dim: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], 8), (heads[1], 8), (heads[1], value_dim))
    return [torch.randn(3, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes]


def dense(query, key, value, layout: TokenLayout) -> torch.Tensor:
    """A loop-free softmax under the mask, written from the specification."""
    group = query.shape[1] // key.shape[1]
    segments = layout.index[:, 0, : layout.q_len].long()
    last = segments.amax(1)[:, None, None]
    mine, other = segments[:, :, None], segments[:, None]
    slots = torch.arange(layout.q_len)
    allowed = ((mine == other) & (slots <= slots[:, None])) | ((mine >= 1) & (other == 0))
    allowed = (allowed | ((mine == last) & (other < last))) & (mine >= 0) & (other >= 0)
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value.repeat_interleave(group, 1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_dense_attention_and_its_gradients(lengths, heads, backend, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    layout = layout_of(lengths)
    exact = [t.requires_grad_() for t in tensors(heads, layout.q_len)]
    single = [t.detach().float().requires_grad_() for t in exact]
    eager = [t.detach().float().requires_grad_() for t in exact]
    outs = [dense(*exact, layout), ops.document_attention(*single, tokens=layout), dense(*eager, layout)]
    cotangent = torch.randn(outs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for out in outs:
        (out * cotangent.to(out.dtype)).sum().backward()
    assert_as_good_as_eager(outs[1].detach(), outs[2].detach(), outs[0].detach())
    for got, plain, oracle in zip(single, eager, exact, strict=True):
        assert_as_good_as_eager(got.grad, plain.grad, oracle.grad)
    padding = layout.index[:, 0, : layout.q_len] < 0
    assert (outs[1].transpose(1, 2)[padding] == 0).all()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_many_steps_give_the_same(lengths, monkeypatch):
    from hf_attn.ops.hfattn_sparse.documents import torch_path

    layout = layout_of(lengths)
    inputs = [t.requires_grad_() for t in tensors((9, 3), layout.q_len)]
    results = []
    for elements in (1 << 20, 1):
        monkeypatch.setattr(torch_path, "MAX_GATHERED", elements)
        out = ops.document_attention(*inputs, tokens=layout)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_one_segment_is_causal_and_one_document_is_too():
    """With running positions nothing but the mask differs, and for one document it hides nothing."""
    for lengths in ([9], [4, 5], [3, 4, 2]):
        layout = TokenLayout.documents(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None])
        query, key, value = (t[:1] for t in tensors((9, 3), 9))
        causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(ops.document_attention(query, key, value, tokens=layout), causal)


def test_hidden_documents_may_hold_anything():
    """NaN and inf in one document reach no other; the reader alone sees them."""
    layout = TokenLayout.documents(torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])[None])
    query, key, value = (t[:1].clone() for t in tensors((9, 3), 10))
    expected = ops.document_attention(query, key, value, tokens=layout)
    key[:, :, 5:7], value[:, :, 5:7] = float("nan"), float("inf")
    got = ops.document_attention(query, key, value, tokens=layout)
    assert torch.equal(got[:, :, :5], expected[:, :, :5]) and got[:, :, 7:].isnan().any()


def test_strided_inputs_and_empty_rows():
    """Tensors as hosts hand them (heads of a token together), a row of padding alone, no token at all."""
    layout = layout_of(LENGTHS["M10"])
    inputs = tensors((9, 3), layout.q_len)
    expected = ops.document_attention(*inputs, tokens=layout)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    torch.testing.assert_close(ops.document_attention(*strided, tokens=layout), expected)
    nothing = TokenLayout.documents(torch.full((3, layout.q_len), -1))
    leaves = [t.requires_grad_() for t in inputs]
    out = ops.document_attention(*leaves, tokens=nothing)
    assert (out == 0).all() and all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))
    empty = [t[:, :, :0] for t in inputs]
    none = TokenLayout.documents(torch.zeros(3, 0, dtype=torch.long))
    assert ops.document_attention(*empty, tokens=none).shape == (3, 9, 0, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layout = layout_of(LENGTHS["M10"])
    exact = tensors((9, 3), layout.q_len)
    half = [t.to(dtype) for t in exact]
    oracle = dense(*[t.double() for t in half], layout)
    assert_as_good_as_eager(ops.document_attention(*half, tokens=layout), dense(*half, layout), oracle)


def test_scores_by_hand():
    """Softmax over document tokens alone, summed by document; a document without tokens and a row without any get 0."""
    segments = torch.tensor([[0, 0, 1, 1, 3, 4, 4], [-1, -1, -1, 0, 0, 1, 1]])
    layout = TokenLayout.documents(segments, torch.tensor([5, 2]))
    query, key = (t[:2].clone().requires_grad_() for t in tensors((9, 3), 7)[:2])
    rows = torch.tensor([[5, 6], [5, 6]])
    scores = ops.document_scores(query, key, tokens=layout, rows=rows, num_documents=3)
    logits = query[0, :, 5:] @ key[0].repeat_interleave(3, 0).mT * 8**-0.5
    weights = logits[..., [2, 3, 4]].softmax(-1)
    torch.testing.assert_close(scores[0, ..., 0], weights[..., :2].sum(-1))
    torch.testing.assert_close(scores[0, ..., 2], weights[..., 2])
    assert (scores[0, ..., 1] == 0).all() and (scores[1] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(scores[..., 0].sum(), (query, key)))


def test_custom_op():
    layout = layout_of(LENGTHS["M3"])
    table = torch.cat([layout.index, layout.roles[:, None]], 1)[..., layout.q_len :].contiguous()
    inputs = [t.requires_grad_() for t in tensors((4, 2), layout.q_len)]
    torch.library.opcheck(op.document_attention, (*inputs, table, 0.5))


def test_layout_and_mechanism_agree():
    """The dense fallback of the layout, of single rows of it, and the picture say the same as the op."""
    layout = layout_of(LENGTHS["M10"])
    query, key, value = tensors((9, 3), layout.q_len)
    call = AttentionCall(query, key, value, 8**-0.5, True, layout)
    real = layout.index[:, 0, : layout.q_len] >= 0
    out = MECHANISM(call, BlockRankConfig())
    torch.testing.assert_close(out.transpose(1, 2)[real], ops.dense_attention(call).transpose(1, 2)[real])
    some = layout.query_rows(5, 9, True)
    assert torch.equal(some.visible(True), layout.visible(True)[:, :, 5:9])
    pattern = MECHANISM.select(call, BlockRankConfig())
    assert pattern.q_len == layout.q_len and not (layout.visible(True) & ~pattern.to_token_mask()).any()


BAD = {
    "plain": (TokenLayout.full(3, 9), "tokens must be a TokenLayout.documents"),
    "length": (TokenLayout.documents(torch.zeros(3, 8, dtype=torch.long)), r"tokens describes \(3, 8\)"),
}


@pytest.mark.parametrize("tokens, message", BAD.values(), ids=BAD)
def test_bad_layouts(tokens, message):
    query, key, value = tensors((9, 3), 9)
    with pytest.raises(ValueError, match=message):
        ops.document_attention(query, key, value, tokens=tokens)


def test_positions_need_segments_and_roles():
    with pytest.raises(ValueError, match="needs a layout of TokenLayout.documents"):
        positions(TokenLayout.full(3, 9), query_offset=64)


def test_other_ops_refuse_documents():
    query, key, value = tensors((9, 3), 9)
    tokens = TokenLayout.documents(torch.zeros(3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="describes a prompt of documents"):
        ops.select_routes(query, key, block_size=4, top_k=2, tokens=tokens)
    with pytest.raises(ValueError, match="as many queries as keys, got 2 and 9"):
        ops.document_attention(query[:, :, :2], key, value, tokens=tokens)
    with pytest.raises(ValueError, match="segments must be an integer tensor"):
        TokenLayout.documents(torch.zeros(3, 9))
