"""ms_deform_attn: every path against fp64, borders, half precision, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from hf_attn.ops import ms_deform_attn
from hf_attn.ops.hfattn_sparse.deformable import op
from tests.budget import assert_as_good_as_eager

SHAPES = [(6, 5), (3, 4), (1, 1)]
BACKENDS = ("grid_sample", "torch")


def inputs(shapes=SHAPES, batch=2, queries=7, heads=2, dim=4, points=3, spread=1.6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(h * w for h, w in shapes)

    def draw(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = draw(batch, total, heads, dim) - 0.5
    locations = (draw(batch, queries, heads, len(shapes), points, 2) - 0.5) * spread + 0.5
    weights = draw(batch, queries, heads, len(shapes), points)
    return [t.to(dtype) for t in (value, locations, weights)]


def by_hand(value, shapes, locations, weights):
    """The sum, pixel by pixel."""
    batch, _, heads, dim = value.shape
    out = torch.zeros(*locations.shape[:3], dim, dtype=value.dtype)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, locations.shape[:5])).tolist():
        height, width = shapes[level]
        first = sum(a * c for a, c in shapes[:level])
        x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for i in range(height):
            for j in range(width):
                share = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                if share:
                    out[b, q, h] += weights[b, q, h, level, p] * share * value[b, first + i * width + j, h]
    return out.flatten(2)


def gradients(out, leaves, seed=1):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [{}, {"shapes": [(1, 7)], "points": 1}, {"queries": 1, "batch": 1, "heads": 1, "dim": 1}]
)
def test_equals_the_sum_pixel_by_pixel(backend, case):
    value, locations, weights = inputs(**case)
    shapes = case.get("shapes", SHAPES)
    wanted = by_hand(value, shapes, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, backend=backend), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_path_is_as_good_as_the_reference(dtype):
    """Values in `dtype`, locations and weights in fp32; more queries than one part holds."""
    exact = inputs(queries=150, dim=8)
    given = [exact[0].to(dtype), exact[1].float(), exact[2].float()]
    oracle = [x.double() for x in given]
    results = []
    for tensors, backend in ((given, "torch"), (given, "grid_sample"), (oracle, "grid_sample")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = ms_deform_attn(leaves[0], SHAPES, *leaves[1:], backend=backend)
        results.append((out, *gradients(out, leaves)))
    for name, got, eager, wanted in zip(("out", "value", "locations", "weights"), *results, strict=True):
        assert_as_good_as_eager(got, eager, wanted, slack=3.0, what=name)


def test_parts_equal_the_whole(monkeypatch):
    from hf_attn.ops.hfattn_sparse.deformable import torch_path

    leaves = [t.requires_grad_() for t in inputs(queries=11)]
    whole = ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
    grads = gradients(whole, leaves)
    monkeypatch.setattr(torch_path, "_LOOKUPS", 300)
    parts = ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(parts, leaves), grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    leaves = [t.requires_grad_() for t in inputs(shapes=[(3, 2), (2, 2)], batch=1, queries=2, points=2, dim=2)]
    shapes = [(3, 2), (2, 2)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_outside_give_zero(backend):
    value, locations, weights = inputs(dtype=torch.float32)
    for far in (-3.0, 4.0, 1e30, float("inf"), -float("inf")):
        leaves = [t.clone().requires_grad_() for t in (value, torch.full_like(locations, far), weights)]
        out = ms_deform_attn(leaves[0], SHAPES, *leaves[1:], backend=backend)
        assert not out.any()
    corner = torch.zeros_like(locations)  # a corner of the map: one quarter of the pixel there
    got = ms_deform_attn(torch.ones_like(value), SHAPES, corner, torch.ones_like(weights), backend=backend)
    torch.testing.assert_close(got, torch.full_like(got, 0.25 * len(SHAPES) * 3))


def test_hidden_values_are_never_read():
    """NaN in pixels that no sample touches stays where it is."""
    value, _, weights = inputs(dtype=torch.float32)
    value[:, 1:30] = float("nan")
    locations = torch.tensor([0.5 / 5, 0.5 / 6]).expand(2, 7, 2, 3, 3, 2).clone()
    weights[:, :, :, 1:] = 0
    value[:, 30:] = 0
    out = ms_deform_attn(value[:, :30], [(6, 5)], locations[:, :, :, :1] - 1e-3, weights[:, :, :, :1])
    assert out.isfinite().all()


def test_empty():
    value, locations, weights = inputs()
    assert ms_deform_attn(value, SHAPES, locations[:, :0], weights[:, :0]).shape == (2, 0, 8)
    assert ms_deform_attn(value[:0], SHAPES, locations[:0], weights[:0]).shape == (0, 7, 8)


def test_custom_op_rules():
    value, locations, weights = inputs(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    sizes = [h for h, _ in SHAPES], [w for _, w in SHAPES]
    torch.library.opcheck(op.ms_deform_attn, (leaves[0], *sizes, *leaves[1:]))


def test_compiles_without_a_break():
    value, locations, weights = inputs(dtype=torch.float32)
    run = torch.compile(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(value, locations, weights), ms_deform_attn(value, SHAPES, locations, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": [(6, 5), (3, 4)]}, "describe 42 positions, but value has 43"),
        ({"shapes": [(6, 5), (3, 4), (0, 1)]}, "spatial_shapes must be"),
        ({"shapes": []}, "spatial_shapes must be"),
        ({"value": torch.zeros(2, 43, 8)}, "value must be"),
        ({"locations": torch.zeros(2, 7, 2, 3, 3, 3)}, "sampling_locations must be"),
        ({"locations": torch.zeros(2, 7, 2, 2, 3, 2)}, "sampling_locations has shape"),
        ({"weights": torch.zeros(2, 7, 2, 9)}, "attention_weights must be"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_mistakes_are_named(change, message):
    value, locations, weights = inputs(dtype=torch.float32)
    given = {"value": value, "shapes": SHAPES, "locations": locations, "weights": weights, "backend": "auto"} | change
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(given["value"], given["shapes"], given["locations"], given["weights"], backend=given["backend"])


def test_triton_is_refused_loudly(monkeypatch):
    value, locations, weights = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'grid_sample', 'torch', got 'triton'"):
        ms_deform_attn(value, SHAPES, locations, weights, backend="triton")
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="no Triton path"):
        ms_deform_attn(value, SHAPES, locations, weights)
