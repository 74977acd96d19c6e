"""Spanned window attention against attention over explicitly listed windows."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from tests.budget import assert_as_good_as_eager


def tensors(shape, heads_dim=(6, 9), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    return [
        torch.randn(batch, c, height, width, generator=generator).to(dtype) for c in (*heads_dim[:1] * 2, heads_dim[1])
    ]


def by_tokens(query, key, value, window, mode, heads):
    """The definition: a token sees the tokens of its window; one dense mask for each branch."""
    batch, _, height, width = query.shape
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    h1, w1 = (window, window) if window > 0 else (height, width)
    numbers = {
        "close": (rows // h1) * width + columns // w1,
        "remote": (rows % (height // h1)) * width + columns % (width // w1),
    }
    split = [x.flatten(2).unflatten(1, (heads, -1)).mT for x in (query, key, value)]
    total = 0
    for name in numbers if mode == "hybrid" else (mode,):
        same = numbers[name][:, None] == numbers[name][None]
        scores = split[0] @ split[1].mT * split[0].shape[-1] ** -0.5
        total = total + scores.masked_fill(~same, float("-inf")).softmax(-1) @ split[2]
    return total.mT.flatten(1, 2).view(batch, -1, height, width)


@pytest.mark.parametrize("mode", ["close", "remote", "hybrid"])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((2, 4, 6), 2), ((1, 6, 9), 3), ((1, 4, 4), 4), ((1, 5, 7), 0), ((1, 1, 1), 1), ((1, 6, 2), 1)],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 3])
def test_values_and_gradients(shape, window, mode, heads):
    found, plain, exact = (
        [x.requires_grad_() for x in tensors(shape, dtype=d)] for d in (torch.float32,) * 2 + (torch.float64,)
    )
    outs = [
        ops.spanned_window_attention(*found, window, mode, num_heads=heads),
        by_tokens(*plain, window, mode, heads),
        by_tokens(*exact, window, mode, heads),
    ]
    assert_as_good_as_eager(*outs, slack=4.0, floor=1e-7, what="out")
    for out in outs:
        out.square().sum().backward()
    for name, *three in zip(("query", "key", "value"), found, plain, exact, strict=True):
        assert_as_good_as_eager(*(x.grad for x in three), slack=4.0, floor=1e-6, what=name)


def test_close_and_remote_add_up():
    given = tensors((2, 6, 4))
    parts = [ops.spanned_window_attention(*given, 2, mode, num_heads=3) for mode in ("close", "remote")]
    both = ops.spanned_window_attention(*given, 2, num_heads=3)
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=1e-6, atol=1e-6)


def test_one_window_is_twice_global_attention():
    given = tensors((2, 4, 4))
    once = ops.spanned_window_attention(*given, 0, "close", num_heads=3)
    for window in (0, 4):
        torch.testing.assert_close(ops.spanned_window_attention(*given, window, num_heads=3), 2 * once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "window=3"),
        ({"mode": "near"}, "mode='near'"),
        ({"num_heads": 4}, "num_heads=4"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_bad_input(change, message):
    options = {"window": 2, "mode": "hybrid", "num_heads": 3, **change}
    with pytest.raises(ValueError, match=message):
        ops.spanned_window_attention(*tensors((1, 4, 4)), **options)


def test_maps_that_do_not_fit():
    query, key, value = tensors((1, 4, 4))
    with pytest.raises(ValueError, match="query and key"):
        ops.spanned_window_attention(query, key[:, :3], value, 2, num_heads=3)
    with pytest.raises(ValueError, match="value"):
        ops.spanned_window_attention(query, key, value[:, :, :2], 2, num_heads=3)
