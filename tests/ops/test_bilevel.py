"""bilevel_routing_attention: what it computes, both ways of computing it, gradients, what it refuses."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from tests.budget import assert_as_good_as_eager

# Map, region, heads, query and value width, regions read.
SHAPES = [
    ((8, 8), (4, 2), 2, 8, 8, 3),
    ((6, 9), (2, 3), 3, 4, 10, 1),
    ((5,), (1,), 1, 3, 3, 4),
    ((2, 4, 6), (1, 2, 3), 2, 8, 4, 5),
    ((4, 4), (4, 4), 2, 8, 8, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[0])) + f"-k{shape[-1]}")


def tensors(shape, dtype=torch.float32, rows=2):
    space, _, heads, width, values, _ = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, *space, heads, n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (width, width, values)
    ]


def by_loops(query, key, value, region, routes, scale):
    """The definition, position by position, in the dtype of its inputs."""
    space = query.shape[1:-2]
    regions = region_numbers(space, region)
    flat = [t.flatten(1, -3) for t in (query, key, value)]
    out = torch.zeros_like(flat[2])
    for row in range(query.shape[0]):
        for place, own in enumerate(regions.tolist()):
            seen = torch.isin(regions, routes[row, own])
            scores = torch.einsum("hd,nhd->hn", flat[0][row, place], flat[1][row][seen]) * scale
            out[row, place] = torch.einsum("hn,nhd->hd", scores.softmax(-1), flat[2][row][seen])
    return out.view(value.shape)


def region_numbers(space, region):
    """The region of every position of a map, both row-major."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in space)).view(-1, len(space))
    numbers = torch.zeros(len(places), dtype=torch.long)
    for axis, (n, r) in enumerate(zip(space, region, strict=True)):
        numbers = numbers * (n // r) + places[:, axis] // r
    return numbers


@shapes
@pytest.mark.parametrize("method", ["copy", "mask", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition(shape, method, dtype):
    space, region, heads, width, _, top_k = shape
    inputs = [t.detach() for t in tensors(shape, dtype)]
    routes = ops.select_regions(*inputs[:2], region_size=region, top_k=top_k)
    scale = (heads * width) ** -0.5
    found = ops.bilevel_routing_attention(*inputs, region_size=region, top_k=top_k, method=method)
    exact = by_loops(*(t.double() for t in inputs), region, routes, scale)
    assert_as_good_as_eager(found, by_loops(*inputs, region, routes, scale), exact, slack=3)


@shapes
def test_the_choice(shape):
    space, region, *_, top_k = shape
    query, key, _ = (t.detach() for t in tensors(shape, torch.float64))
    numbers = region_numbers(space, region)
    means = [
        torch.stack([t.flatten(1, -3)[:, numbers == r].mean(1).flatten(1) for r in numbers.unique()], 1)
        for t in (query, key)
    ]
    expected = (means[0] @ means[1].mT).topk(top_k, -1).indices
    assert torch.equal(ops.select_regions(query, key, region_size=region, top_k=top_k), expected)


@shapes
@pytest.mark.parametrize("method", ["copy", "mask", "blocks"])
def test_gradients(shape, method):
    """Against finite differences; random means have no ties, and the choice is a constant."""
    _, region, *_, top_k = shape
    inputs = tensors(shape, torch.float64, rows=1)

    def run(*given):
        return ops.bilevel_routing_attention(*given, region_size=region, top_k=top_k, method=method)

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("method", ["copy", "mask", "blocks"])
def test_reading_everything_is_full_attention(method):
    query, key, value = (t.detach() for t in tensors(((4, 6), (2, 3), 2, 8, 8, 4), torch.float64))
    found = ops.bilevel_routing_attention(query, key, value, region_size=(2, 3), top_k=4, method=method)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    full = torch.nn.functional.scaled_dot_product_attention(*flat, scale=16**-0.5)
    torch.testing.assert_close(found, full.transpose(1, 2).view(found.shape), rtol=1e-12, atol=1e-12)


def test_given_routes_and_another_attention():
    query, key, value = (t.detach() for t in tensors(SHAPES[0]))
    options = {"region_size": (4, 2), "top_k": 2}
    routes = torch.arange(8)[:, None] // torch.tensor([1, 8]) * torch.ones(2, 1, 1, dtype=torch.long)
    found = ops.bilevel_routing_attention(query, key, value, routes=routes, **options)
    exact = by_loops(query.double(), key.double(), value.double(), (4, 2), routes, 16**-0.5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    seen = []

    def attend(q, k, v, *, scale):
        seen.append((q.shape, k.shape, scale))
        return torch.zeros_like(q)

    out = ops.bilevel_routing_attention(query, key, value, routes=routes, attend=attend, **options)
    assert not out.any() and seen == [((16, 2, 8, 8), (16, 2, 16, 8), 0.25)]


def test_nothing_of_other_regions_is_read():
    query, key, value = (t.detach() for t in tensors(SHAPES[0]))
    routes = torch.zeros(2, 8, 1, dtype=torch.long)
    spoilt = [t.clone() for t in (key, value)]
    for t in spoilt:
        t[:, :, 2:] = float("nan")
        t[:, 4:] = float("nan")
    for method in ("copy", "blocks"):
        options = {"region_size": (4, 2), "top_k": 1, "routes": routes, "method": method}
        clean = ops.bilevel_routing_attention(query, key, value, **options)
        torch.testing.assert_close(ops.bilevel_routing_attention(query, *spoilt, **options), clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region_size": (3, 2), "top_k": 1}, "region_size=.3, 2. must divide the map .8, 8."),
        ({"region_size": (4,), "top_k": 1}, "region_size=.4,. must divide"),
        ({"region_size": (4, 2), "top_k": 9}, "top_k=9 must be between 1 and the 8 regions"),
        ({"region_size": (4, 2), "top_k": 0}, "top_k=0"),
        ({"region_size": (4, 2), "top_k": 2, "method": "fast"}, "method"),
        (
            {"region_size": (4, 2), "top_k": 2, "routes": torch.zeros(2, 4, 2, dtype=torch.long)},
            "routes must be .2, 8, 2.",
        ),
    ],
)
def test_refusals(options, message):
    query, key, value = (t.detach() for t in tensors(SHAPES[0]))
    with pytest.raises(ValueError, match=message):
        ops.bilevel_routing_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="query and key must be"):
        ops.bilevel_routing_attention(query, key[:1], value, region_size=(4, 2), top_k=1)


def test_autocast_does_not_touch_the_choice():
    """Means that differ by less than bf16 can tell."""
    query = torch.ones(1, 8, 1, 4)
    key = query + 1e-4 * torch.tensor([0, 3, 1, 2]).repeat_interleave(2).view(1, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        routes = ops.select_regions(query, key, region_size=(2,), top_k=4)
    assert routes[0, 0].tolist() == [1, 3, 2, 0]
