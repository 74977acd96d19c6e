"""Neural memory: chunks against the token-by-token recurrence, states, masks, closed forms, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.neural_memory import torch_path
from hf_attn.ops.hfattn_sparse.neural_memory.network import inner_gradient, read
from tests.budget import assert_as_good_as_eager

# rows, heads, tokens, d, depth, inner width, chunk
SHAPES = [
    (2, 2, 13, 5, 1, 5, 4),
    (1, 2, 7, 4, 2, 9, 7),
    (2, 1, 10, 3, 3, 6, 3),
    (1, 1, 1, 4, 2, 8, 64),
    (1, 2, 6, 4, 4, 5, 1),
    (1, 1, 20, 4, 2, 8, 64),
]
NAMES = ("query", "key", "value", "theta", "eta", "alpha")


def _inputs(rows, heads, length, dim, depth, inner, dtype=torch.float32, seed=0):
    """Tokens, gates, weights and a momentum that is not zero."""
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(rows, heads, length, dim, generator=g, dtype=torch.float64) for _ in range(3)]
    tokens[0], tokens[1] = (torch.nn.functional.normalize(t, dim=-1) for t in tokens[:2])
    gates = [torch.rand(rows, heads, length, generator=g, dtype=torch.float64) for _ in range(3)]
    gates[1][..., ::5], gates[2][..., 1::6] = 0, 1  # a gate that is shut, and one that erases
    gates[0] *= 0.3
    sizes = [dim, *[inner] * (depth - 1), dim]
    shapes = [(rows, heads, a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    weights = [torch.randn(s, generator=g, dtype=torch.float64) / math.sqrt(s[2]) for s in shapes]
    momentum = [0.2 * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [t.to(dtype) for t in (*tokens, *gates)], [w.to(dtype) for w in weights], [s.to(dtype) for s in momentum]


def _everything(tokens, weights, momentum, monkeypatch, path, **options):
    """Output, states and the gradients of all inputs of a loss on all of them."""
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    leaves = [t.clone().requires_grad_() for t in (*tokens, *weights, *momentum)]
    count = len(weights)
    given, start, moving = leaves[:6], leaves[6 : 6 + count], leaves[6 + count :]
    out, states = ops.neural_memory(*given, start, momentum=moving, output_final_state=True, **options)
    results = [out, *states.weights, *states.momentum]
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    shown = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
    return [r.detach() for r in (*results, *states.chunk_start_weights)] + shown


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_give_the_recurrence_and_its_gradients(shape, before, monkeypatch):
    *sizes, chunk = shape
    options = {"chunk_size": chunk, "read_before_write": before}
    single, double = _inputs(*sizes), _inputs(*sizes, dtype=torch.float64)
    oracle = _everything(*double, monkeypatch, "reference", **options)
    eager = _everything(*single, monkeypatch, "reference", **options)
    for number, (got, plain, exact) in enumerate(
        zip(_everything(*single, monkeypatch, "torch", **options), eager, oracle, strict=True)
    ):
        assert_as_good_as_eager(got, plain, exact, slack=4, what=f"result {number}")
    for got, exact in zip(_everything(*double, monkeypatch, "torch", **options), oracle, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mean", [False, True])
def test_the_inner_gradient_is_that_of_the_loss(mean):
    (_, key, value, *_), weights, _ = _inputs(1, 2, 1, 4, 3, 6, dtype=torch.float64)
    leaves = [w.clone().requires_grad_() for w in weights]
    error = (read(key, leaves) - value).square()
    expected = torch.autograd.grad(error.mean(-1).sum() if mean else error.sum(), leaves)
    inputs, deltas = inner_gradient(key, value, weights, mean_loss=mean)
    for a, delta, exact in zip(inputs, deltas, expected, strict=True):
        torch.testing.assert_close(a.mT @ delta, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_sequence_may_be_cut_anywhere(chunk):
    tokens, weights, momentum = _inputs(2, 2, 14, 4, 2, 7, dtype=torch.float64)
    whole, final = ops.neural_memory(*tokens, weights, momentum=momentum, chunk_size=chunk, output_final_state=True)
    for cuts in ([5], [1, 2, 3, 13], [4, 8], list(range(1, 14))):
        states, parts, start = ops.MemoryStates(tuple(weights), tuple(momentum), tuple(weights), 0), [], 0
        for stop in [*cuts, 14]:
            part, states = ops.neural_memory(
                *(t[:, :, start:stop] for t in tokens),
                states.weights,
                momentum=states.momentum,
                chunk_start_weights=states.chunk_start_weights,
                chunk_offset=states.chunk_offset,
                chunk_size=chunk,
                output_final_state=True,
            )
            parts.append(part)
            start = stop
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-11)
        for got, want in zip(states[:3], final[:3], strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert states.chunk_offset == 14


@pytest.mark.parametrize("path", ["torch", "reference"])
def test_hidden_tokens_count_for_nothing(path, monkeypatch):
    """Rows of 9, 4, 0 and 1 real tokens anywhere, twice, are the rows without the others; NaN may hide there."""
    monkeypatch.setenv("HF_ATTN_BACKEND", path)
    tokens, weights, momentum = _inputs(4, 2, 9, 4, 2, 6, dtype=torch.float64)
    mask = torch.tensor([[1] * 9, [0, 1, 1, 0, 0, 1, 0, 1, 0], [0] * 9, [0] * 8 + [1]]).bool()
    hidden = [t.masked_fill(~(mask[:, None, :, None] if t.dim() == 4 else mask[:, None]), math.nan) for t in tokens]
    states = ops.MemoryStates(tuple(weights), tuple(momentum), tuple(weights), 0)
    for _ in range(2):
        options = {"chunk_size": 4, "output_final_state": True}
        carried = {"chunk_start_weights": states.chunk_start_weights, "chunk_offset": states.chunk_offset}
        out, new = ops.neural_memory(
            *hidden, states.weights, momentum=states.momentum, mask=mask.int(), **carried, **options
        )
        assert not out[~mask[:, None].expand(-1, 2, -1)].any()
        for row in range(4):
            real = mask[row]
            before = states.chunk_offset if isinstance(states.chunk_offset, int) else int(states.chunk_offset[row])
            alone, end = ops.neural_memory(
                *(t[row : row + 1, :, real] for t in tokens),
                [w[row : row + 1] for w in states.weights],
                momentum=[s[row : row + 1] for s in states.momentum],
                chunk_start_weights=[a[row : row + 1] for a in states.chunk_start_weights],
                chunk_offset=before,
                **options,
            )
            torch.testing.assert_close(out[row : row + 1, :, real], alone, rtol=0, atol=1e-11)
            assert int(new.chunk_offset[row]) == end.chunk_offset == before + int(real.sum())
            for got, want in zip(new[:2], end[:2], strict=True):
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a[row : row + 1], b, rtol=0, atol=1e-11)
        states = new


def test_orthonormal_keys_are_remembered_exactly():
    """Step 1/2 without momentum corrects a linear memory at once; forgetting 1 erases; momentum 1 keeps on."""
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    keys, values = basis[None, None, :6], torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    start = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))]
    half, zero, one = (torch.full((1, 1, 6), x) for x in (0.5, 0.0, 1.0))
    _, states = ops.neural_memory(keys, keys, values, half, zero, zero, start, chunk_size=1, output_final_state=True)
    torch.testing.assert_close(ops.read_memory(keys, states.weights), values, rtol=0, atol=1e-5)
    _, erased = ops.neural_memory(keys, keys, values, zero, zero, one, start, chunk_size=1, output_final_state=True)
    assert not erased.weights[0].any()
    push = [torch.ones(1, 1, 8, 8)]
    _, moved = ops.neural_memory(
        keys, keys, values, zero, one, zero, start, momentum=push, chunk_size=3, output_final_state=True
    )
    torch.testing.assert_close(moved.weights[0], start[0][None] + 6, rtol=0, atol=1e-5)


def test_long_inner_gradients_are_scaled_down(monkeypatch):
    tokens, weights, momentum = _inputs(1, 1, 9, 4, 2, 6, dtype=torch.float64)
    inputs, deltas = inner_gradient(tokens[1], tokens[2] * 50, weights, max_norm=0.5)
    norms = sum(a.square().sum(-1) * d.square().sum(-1) for a, d in zip(inputs, deltas, strict=True)).sqrt()
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    options = {"chunk_size": 4, "max_inner_grad_norm": 0.5, "loss_reduction": "mean"}
    want = _everything(tokens, weights, momentum, monkeypatch, "reference", **options)
    for got, exact in zip(_everything(tokens, weights, momentum, monkeypatch, "torch", **options), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


def test_half_precision_and_autocast_keep_an_exact_memory():
    tokens, weights, _ = _inputs(1, 2, 40, 4, 2, 6)
    exact = ops.neural_memory(*tokens, weights, chunk_size=8)
    half = [t.bfloat16() for t in tokens[:3]] + tokens[3:]
    out, states = ops.neural_memory(*half, [w.bfloat16() for w in weights], chunk_size=8, output_final_state=True)
    assert out.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for s in states[:3] for t in s)
    assert (out.float() - exact).norm() / exact.norm() < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.neural_memory(*tokens, weights, chunk_size=8), exact)


def test_nothing_at_all():
    tokens, weights, momentum = _inputs(2, 1, 0, 4, 2, 6)
    out, states = ops.neural_memory(*tokens, weights, momentum=momentum, output_final_state=True)
    assert out.shape == (2, 1, 0, 4) and states.chunk_offset == 0 and torch.equal(states.weights[0], weights[0])


def test_second_order_gradients_are_exact():
    tokens, weights, momentum = _inputs(1, 1, 5, 3, 2, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*tokens, *weights, *momentum)]

    def run(*given):
        return ops.neural_memory(*given[:6], given[6:8], momentum=given[8:], chunk_size=2)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_offset": 3}, "chunk_start_weights"),
        ({"chunk_offset": -1}, "chunk_offset"),
        ({"weights": []}, "depth >= 1"),
        ({"weights": [torch.zeros(3, 4, 4)]}, "2 heads"),
        ({"weights": [torch.zeros(2, 4, 6), torch.zeros(2, 5, 4)]}, r"weights\[1\]"),
        ({"weights": [torch.zeros(2, 4, 6)]}, "head_dim 4"),
        ({"weights": [torch.zeros(3, 2, 4, 4)]}, "another batch"),
        ({"momentum": []}, "momentum has 0"),
        ({"mask": torch.ones(1, 6)}, "mask must be"),
        ({"theta": torch.zeros(1, 2, 1)}, "theta must be"),
        ({"value": torch.zeros(1, 2, 6, 5)}, "value must be"),
        ({"loss_reduction": "max"}, "loss_reduction"),
        ({"max_inner_grad_norm": 0.0}, "max_inner_grad_norm"),
        ({"alpha": torch.full((1, 2, 6), 1.5)}, "alpha must be in"),
        ({"theta": torch.full((1, 2, 6), -0.5)}, "theta must be >= 0"),
    ],
)
def test_bad_input_is_named(change, word, monkeypatch):
    monkeypatch.setenv("HF_ATTN_CHECK", "1")
    tokens, weights, _ = _inputs(1, 2, 6, 4, 1, 4)
    given = dict(zip(NAMES, tokens, strict=True)) | {"weights": weights, "chunk_size": 4} | change
    with pytest.raises(ValueError, match=word):
        ops.neural_memory(**given)


def test_a_memory_that_forgets_ends_in_zeros(monkeypatch):
    """Forgetting for long leaves no subnormal numbers, in the states or in the factors of the gates: they are slow."""
    tokens, weights, momentum = _inputs(1, 2, 200, 4, 2, 8, seed=1)
    tokens[3] *= 1e-3
    tokens[4].fill_(0.4)
    tokens[5].fill_(0.5)
    oracle = _everything(tokens, weights, momentum, monkeypatch, "reference", chunk_size=100)
    got = _everything(tokens, weights, momentum, monkeypatch, "torch", chunk_size=100)
    for one, other in zip(got, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for state in got[1:7]:
        assert ((state == 0) | (state.abs() > torch.finfo(state.dtype).tiny)).all()
    factors = torch_path._coefficients(*(g[0] for g in tokens[3:]), None, [100] * 2)
    for factor in (t for piece in factors for t in piece):
        assert ((factor == 0) | (factor.abs() > torch.finfo(factor.dtype).tiny)).all()


def test_states_of_exactly_zero_have_gradients(monkeypatch):
    """Momentum 0 and steps of 0: nothing is added, and what more of a step would add is known."""
    tokens, weights, momentum = _inputs(1, 2, 9, 4, 1, 4, dtype=torch.float64)
    tokens[3].zero_()
    momentum = [torch.zeros_like(m) for m in momentum]
    oracle = _everything(tokens, weights, momentum, monkeypatch, "reference", chunk_size=3)
    got = _everything(tokens, weights, momentum, monkeypatch, "torch", chunk_size=3)
    assert (oracle[7] != 0).any()  # of theta
    for one, other in zip(got, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
