"""grouped_softmax_attention: the torch path against the fp64 reference, the rules of its weights, and its refusals."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.ops.hfattn_sparse.grouped import op, torch_path
from tests.budget import assert_as_good_as_eager

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (1, 2, 3, 7, 15, 31, 64, 65, 129)


def run(tensors: tuple[Tensor, ...], cotangents: tuple[Tensor, ...] | None, **options) -> list[Tensor]:
    """Output, lse (0 for empty rows) and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = ops.grouped_softmax_attention(*leaves, return_lse=True, **options)
    lse = torch.where(lse.isinf(), 0, lse)
    if cotangents is not None:
        ((out * cotangents[0].to(out.dtype)).sum() + (lse * cotangents[1].to(lse.dtype)).sum()).backward()
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def setting(number: int) -> tuple[tuple[Tensor, ...], dict]:
    """A random call in fp64, and its options."""
    pick = random.Random(number)
    torch.manual_seed(number)
    batch, kv_heads, group = pick.choice([1, 2, 3]), pick.choice([1, 2, 3]), pick.choice([1, 3, 8])
    k_len = pick.choice(LENGTHS)
    q_len = pick.choice([k_len, k_len, 1, min(k_len, 5), k_len + 2])
    dim, value_dim = pick.choice([4, 8, 16]), pick.choice([4, 8, 24])
    layout = pick.choice(["plain", "padded", "packed"])
    options: dict = {"scale": pick.choice([None, 0.3])}
    if layout == "packed":
        batch, q_len = 1, k_len
        cut = pick.randrange(k_len + 1)
        options["cu_seqlens_q"] = torch.tensor([0, cut, k_len], dtype=torch.int32)
    elif layout == "padded":
        q_len = k_len
        options["key_start"] = torch.randint(k_len, (batch,))
    if pick.random() < 0.5:
        options["block_size"] = pick.choice([2, 3, 8, 16, 500])
    else:
        options["landmarks"] = torch.rand(batch, k_len) < pick.choice([0.0, 0.1, 0.4, 1.0])
    shapes = ((kv_heads * group, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim))
    return tuple(torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes), options


@pytest.mark.parametrize("number", range(60))
def test_random_configurations(number, monkeypatch):
    """Forward, lse and every gradient, in small tiles for every other configuration."""
    tensors, options = setting(number)
    dtype = DTYPES[number % len(DTYPES)]
    if number % 2:
        monkeypatch.setattr(torch_path, "MAX_SCORES", 1)
    exact = tuple(t.to(dtype).double() for t in tensors)
    lse_shape = tensors[0].shape[:3]
    cotangents = (torch.randn(*lse_shape, tensors[2].shape[3]), torch.randn(lse_shape))
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    oracle = run(exact, cotangents, **options)
    eager = run(tuple(t.to(dtype) for t in tensors), cotangents, **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    got = run(tuple(t.to(dtype) for t in tensors), cotangents, **options)
    assert ops.path_counts()["grouped_softmax_attention | torch"] == 1
    for name, *three in zip(("out", "lse", "dq", "dk", "dv"), got, eager, oracle, strict=True):
        assert_as_good_as_eager(*three, what=name, slack=3.0, floor=1e-7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_weights_are_a_distribution_without_landmarks_and_future(backend, monkeypatch):
    """Specification, item 2."""
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    tokens = 29
    identity = torch.eye(tokens).expand(2, 3, tokens, tokens)
    query, key = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)
    weights = ops.grouped_softmax_attention(query, key, identity, block_size=6)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5
    assert not weights[..., 5::6].any() and not weights.triu(1).any()


@pytest.mark.parametrize("options", [{"block_size": 30}, {"landmarks": torch.zeros(2, 29, dtype=torch.bool)}])
def test_without_a_landmark_it_is_causal_attention(options):
    """Specification, item 3."""
    tensors = [torch.randn(2, 3, 29, 8) for _ in range(3)]
    want = scaled_dot_product_attention(*tensors, is_causal=True)
    assert (ops.grouped_softmax_attention(*tensors, **options) - want).abs().max() < 1e-6


def test_two_hundred_landmarks_in_one_softmax(monkeypatch):
    """Specification, item 5; the original's buckets end at 62."""
    tensors = tuple(torch.randn(1, 2, 805, 4) for _ in range(3))
    got = run(tensors, None, block_size=4)[0]
    monkeypatch.setenv("HF_ATTN_BACKEND", "reference")
    assert (got - run(tensors, None, block_size=4)[0]).abs().max() < 1e-5


def test_equal_places_give_equal_results_however_they_are_named():
    tensors = tuple(torch.randn(2, 4, 23, 8) for _ in range(3))
    flags = (torch.arange(23) % 5 == 4).expand(2, 23)
    named, regular = (run(tensors, None, **o)[0] for o in ({"landmarks": flags}, {"block_size": 5}))
    assert (named - regular).abs().max() < 1e-6


def test_gqa_equals_repeated_heads():
    """Specification, item 9."""
    query, key, value = torch.randn(2, 9, 31, 8), torch.randn(2, 3, 31, 8), torch.randn(2, 3, 31, 8)
    wide = (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
    grouped, repeated = (run(t, None, block_size=5)[0] for t in ((query, key, value), wide))
    assert (grouped - repeated).abs().max() < 1e-6


def test_padding_and_landmark_values_are_never_read():
    query, key, value = (torch.randn(2, 2, 20, 4) for _ in range(3))
    clean = ops.grouped_softmax_attention(query, key, value, block_size=4, key_start=torch.tensor([0, 6]))
    key[1, :, :6], value[1, :, :6] = float("nan"), float("inf")
    value[0, :, 3::4] = float("nan")
    value[1, :, 9::4] = float("inf")
    got = ops.grouped_softmax_attention(query, key, value, block_size=4, key_start=torch.tensor([0, 6]))
    assert torch.equal(got, clean) and not got[1, :, :6].any()


def test_a_landmark_without_a_block_and_a_query_without_keys():
    """Two landmarks in a row, and one at the very start: the empty blocks are not seen, the first query gets 0."""
    tensors = tuple(torch.randn(1, 1, 6, 4) for _ in range(3))
    flags = torch.tensor([[True, False, True, True, False, False]])
    out, lse = ops.grouped_softmax_attention(*tensors, flags, return_lse=True)
    assert not out[0, 0, 0].any() and lse[0, 0, 0] == float("-inf")
    # The fourth token is a landmark whose own block is empty: it sees the block of token 1 and nothing else.
    assert torch.allclose(out[0, 0, 3], tensors[2][0, 0, 1])


def test_the_op_keeps_the_rules_of_torch():
    tensors = [torch.randn(2, heads, 11, 8, requires_grad=True) for heads in (4, 2, 2)]
    index = TokenLayout.padded(torch.tensor([0, 3]), torch.tensor([11, 8]), 11, 11).index
    flags = torch.rand(2, 11) < 0.3
    for landmarks, rows, size in ((None, None, 4), (None, index, 4), (flags, None, 0), (flags, index, 0)):
        torch.library.opcheck(op.grouped_softmax_attention, (*tensors, landmarks, rows, size, 0.5))
    compiled = torch.compile(ops.grouped_softmax_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*tensors, block_size=4), ops.grouped_softmax_attention(*tensors, block_size=4))


def test_gradcheck():
    tensors = [torch.randn(1, heads, 9, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    options = {"block_size": 4, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *t: ops.grouped_softmax_attention(*t, **options), tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either landmarks"),
        ({"block_size": 1}, "block_size must be an integer >= 2"),
        ({"block_size": 4, "landmarks": torch.zeros(1, 5, dtype=torch.bool)}, "not both"),
        ({"landmarks": torch.zeros(1, 4, dtype=torch.bool)}, r"landmarks must be a bool tensor \[B, Nk\] = \[1, 5\]"),
        ({"landmarks": torch.zeros(1, 5)}, "landmarks must be a bool tensor"),
    ],
)
def test_bad_arguments(options, message):
    tensors = [torch.randn(1, 1, 5, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        ops.grouped_softmax_attention(*tensors, **options)
