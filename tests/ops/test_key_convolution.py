"""ops.key_convolution against torch's own conv1d, and everything about where a sequence begins."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_attn import ops
from hf_attn.nn.key_convolution import KeyConvolution
from tests.budget import assert_as_good_as_eager


def plain(key: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The formula by `conv1d`, one full sequence a row."""
    batch, heads, length, dim = key.shape
    rows = key.transpose(2, 3).reshape(batch, heads * dim, length)
    weight = weight.reshape(heads * dim, 1, -1)
    total = F.conv1d(F.pad(rows, (weight.shape[2] - 1, 0)), weight, groups=heads * dim)
    return (rows + F.silu(total)).view(batch, heads, dim, length).transpose(2, 3)


def draw(batch=2, heads=3, length=13, dim=4, width=3, dtype=torch.float32):
    return torch.randn(batch, heads, length, dim, dtype=dtype), torch.randn(heads * dim, 1, width, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_conv1d(length, width, dtype):
    key, weight = draw(length=length, width=width, dtype=dtype)
    oracle = plain(key.double(), weight.double())
    assert_as_good_as_eager(ops.key_convolution(key, weight), plain(key, weight), oracle)
    assert torch.equal(ops.key_convolution(key, weight[:, 0]), ops.key_convolution(key, weight))


def test_gradcheck():
    key, weight = draw(1, 2, 6, 2, 3, torch.float64)
    state = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    inputs = [t.requires_grad_() for t in (key, weight, state)]

    def run(key, weight, state):
        return ops.key_convolution(key, weight, initial_state=state, sequence_ids=ids, return_state=True)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("rows", [None, 2, 7])
def test_chunks_equal_one_pass(rows):
    """Chunks of 1, 4, 0 and 8 tokens with the state handed on; a longer state changes nothing."""
    key, weight = draw()
    state = None if rows is None else torch.zeros(2, 3, rows, 4)
    parts = []
    for chunk in key.split([1, 4, 0, 8], 2):
        part, state = ops.key_convolution(chunk, weight, initial_state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), plain(key, weight))
    kept = rows or 2
    assert state.shape[2] == kept and torch.equal(state, key[:, :, -kept:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_is_never_read(poison):
    """Left, right and inner padding equal the row without it, forward, gradients and state, whatever padding holds."""
    key, weight = draw(4, 2, 9, 4)
    ids = torch.zeros(4, 9, dtype=torch.long)
    ids[0, :4] = ids[1, 6:] = ids[2, 3] = -1
    ids[3] = -1
    key[(ids < 0)[:, None].expand(4, 2, 9)] = poison
    weight.requires_grad_()
    out, state = ops.key_convolution(key, weight, sequence_ids=ids, return_state=True)
    assert out.isfinite().all() and state.isfinite().all()
    assert not out[(ids < 0)[:, None].expand(4, 2, 9)].any() and not state[3].any()
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    want_grad = torch.zeros_like(grad)
    for row in range(3):
        real = key[row : row + 1, :, ids[row] == 0]
        want = plain(real, weight)
        torch.testing.assert_close(out[row : row + 1, :, ids[row] == 0], want)
        assert torch.equal(state[row : row + 1], real[:, :, -2:])
        want_grad += torch.autograd.grad(want.square().sum(), weight)[0]
    torch.testing.assert_close(grad, want_grad)


def test_packed_equals_separate():
    key, weight = draw(1, 2, 12, 4, 5)
    cu = torch.tensor([0, 1, 6, 6, 12])
    out, state = ops.key_convolution(key, weight, cu_seqlens=cu, return_state=True)
    torch.testing.assert_close(out, torch.cat([plain(part, weight) for part in key.split([1, 5, 6], 2)], 2))
    assert torch.equal(state, key[:, :, -4:])
    short = ops.key_convolution(key[:, :, :7], weight, cu_seqlens=cu.clamp(max=7), return_state=True)[1]
    assert torch.equal(short[:, :, 3:], key[:, :, 6:7]) and not short[:, :, :3].any()


def test_key_start_and_length():
    key, weight = draw(2, 2, 8, 4)
    out = ops.key_convolution(key, weight, key_start=torch.tensor([3, 0]), key_length=torch.tensor([5, 6]))
    torch.testing.assert_close(out[:1, :, 3:], plain(key[:1, :, 3:], weight))
    torch.testing.assert_close(out[1:, :, :6], plain(key[1:, :, :6], weight))


def test_zero_weight_changes_nothing_and_still_learns():
    layer = KeyConvolution(12, 3, "zeros")
    key = torch.randn(2, 3, 9, 4)
    out = layer(key)
    assert torch.equal(out, key)
    out.square().sum().backward()
    assert layer.weight.grad.abs().min() > 0
    drawn = KeyConvolution(1000, 3).weight
    assert drawn.abs().max() <= 3**-0.5 and drawn.std().item() == pytest.approx(1 / 3, rel=0.1)


def test_compiles_in_one_graph():
    key, weight = draw()
    ids = torch.zeros(2, 13, dtype=torch.long)
    ids[0, :3] = -1
    run = torch.compile(ops.key_convolution, fullgraph=True, backend="aot_eager")
    got = run(key, weight, sequence_ids=ids, return_state=True)
    want = ops.key_convolution(key, weight, sequence_ids=ids, return_state=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.zeros(5, 1, 3)}, "weight must be .* 12 channels"),
        ({"weight": torch.zeros(12, 2, 3)}, "weight must be"),
        ({"weight": torch.zeros(12, 1, 0)}, "at least one tap"),
        ({"key": torch.zeros(2, 3, 9)}, "key must be a floating-point tensor"),
        ({"initial_state": torch.zeros(2, 3, 1, 4)}, "initial_state must be .*at least 2"),
        ({"sequence_ids": torch.zeros(2, 8, dtype=torch.long)}, "sequence_ids must be"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "one packed row"),
        ({"key_start": 2}, "needs key_length"),
        ({"cu_seqlens": torch.tensor([0, 9]), "key_length": torch.tensor([1, 2])}, "only one of"),
    ],
)
def test_bad_input(options, message):
    arguments = {"key": torch.zeros(2, 3, 9, 4), "weight": torch.zeros(12, 1, 3), **options}
    with pytest.raises(ValueError, match=message):
        ops.key_convolution(arguments.pop("key"), arguments.pop("weight"), **arguments)


@pytest.mark.parametrize("width", [2, 1, 0, -3, 3.0, True])
def test_widths_are_odd_integers(width):
    with pytest.raises(ValueError, match="kconv_width must be"):
        KeyConvolution(4, width)
