"""The selective scan: the two-level form against the loop, states, masks, dtypes, compilation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.selective_scan import op, reference, torch_path
from tests.budget import assert_as_good_as_eager

NAMES = ("y", "state", "u", "delta", "A", "B", "C", "initial_state")
# rows, groups, tokens, channels, state size: one token, lengths that no segment divides, one span and many, strips
SHAPES = [
    (1, 1, 1, 3, 2),
    (2, 2, 7, 5, 1),
    (2, 3, 70, 16, 4),
    (1, 4, 256, 8, 1),
    (2, 1, 257, 12, 16),
    (1, 2, 130, 300, 16),
    (9, 4, 33, 8, 128),
]


def inputs(rows, groups, length, channels, size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, draw=torch.randn):
        return draw(shape, generator=generator, dtype=torch.float64)

    tensors = [
        rand(rows, groups, length, channels),
        rand(rows, groups, length, channels, draw=torch.rand) * 0.5,
        -4 * rand(groups, channels, size, draw=torch.rand),
        rand(rows, groups, length, size),
        rand(rows, groups, length, size),
        rand(rows, groups, channels, size),
    ]
    return [t.to(dtype) for t in tensors]


def scan(*tensors):
    return ops.selective_scan(*tensors[:5], initial_state=tensors[5], return_state=True)


def gradients(run, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in out]
    loss = sum((t * w).sum() for t, w in zip(out, weights, strict=True))
    return *(t.detach() for t in out), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_levels_give_the_loop_and_its_gradients(shape):
    tensors = inputs(*shape)
    exact = [t.double() for t in tensors]
    oracle = gradients(reference.forward, exact)
    eager = gradients(reference.forward, tensors)
    for name, got, plain, want in zip(NAMES, gradients(scan, tensors), eager, oracle, strict=True):
        assert_as_good_as_eager(got, plain, want, slack=4, what=name)
    for got, want in zip(gradients(scan, exact), oracle, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(float(want.abs().max()), 1))


def test_the_cut_uses_one_span_only_where_a_step_is_wide():
    narrow, wide = torch_path.plan(4, 1024, 160, "cpu"), torch_path.plan(256, 1024, 160 * 16, "cpu")
    assert narrow.spans > 8 and narrow.strip == 4 and narrow.span <= 64
    assert wide.spans == 1 and wide.strip * 160 * 16 <= torch_path.STEP_FLOATS
    device = torch_path.plan(8, 4096, 640 * 16, "cuda")
    assert device.span == torch_path.DEVICE_SPAN and device.spans == 64 and device.strip == 3
    for length in (1, 2, 15, 16, 17, 100, 1023):
        cut = torch_path.plan(3, length, 8, "cpu")
        assert length <= cut.spans * cut.span < length + cut.span and cut.tokens <= torch_path.SEGMENT


@pytest.mark.parametrize("limit", [64, 1 << 9])
def test_small_strips(limit, monkeypatch):
    """Strips that cut through rows and groups, and many spans, give the same."""
    tensors = inputs(3, 2, 90, 10, 3, torch.float64)
    want = gradients(reference.forward, tensors)
    monkeypatch.setattr(torch_path, "STEP_FLOATS", limit)
    for got, expected in zip(gradients(scan, tensors), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_cut_of_other_devices(monkeypatch):
    """The spans and strips that a GPU gets, on the CPU."""
    tensors = inputs(3, 2, 200, 6, 3, torch.float64)
    want = gradients(reference.forward, tensors)
    cut = torch_path.plan
    monkeypatch.setattr(torch_path, "DEVICE_STEP_FLOATS", 250)
    monkeypatch.setattr(torch_path, "plan", lambda rows, length, width, _: cut(rows, length, width, "cuda"))
    assert torch_path.plan(6, 200, 18, "cpu")[1:] == (3, 5, 14, 4)
    for got, expected in zip(gradients(scan, tensors), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_bias_softplus_and_direct_path():
    u, delta, A, B, C, _ = inputs(2, 2, 20, 6, 3, torch.float64)
    D, bias = torch.randn(2, 6).double(), torch.randn(2, 6).double()
    got = ops.selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    y, _ = reference.forward(u, softplus(delta + bias[:, None]), A, B, C, None)
    torch.testing.assert_close(got, y + D[:, None] * u, rtol=0, atol=1e-12)


def test_states_continue_and_masked_tokens_do_nothing():
    u, delta, A, B, C, state = inputs(2, 2, 50, 6, 3, torch.float64)
    whole, final = scan(u, delta, A, B, C, state)
    parts, running = [], state
    for rows in (slice(0, 1), slice(1, 20), slice(20, 50)):
        y, running = scan(*(t[:, :, rows] for t in (u, delta)), A, *(t[:, :, rows] for t in (B, C)), running)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(running, final, rtol=0, atol=1e-11)
    # Tokens that are not real lie before, between and behind; what they hold, NaN included, does not matter.
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, :10] = mask[1, 5:10] = mask[1, 55:] = False
    padded = [torch.full((2, 2, 60, t.shape[3]), float("nan"), dtype=t.dtype) for t in (u, delta, B, C)]
    for wide, tensor in zip(padded, (u, delta, B, C), strict=True):
        for row in range(2):
            wide[row][:, mask[row]] = tensor[row]
    y, end = ops.selective_scan(
        *padded[:2], A, *padded[2:], torch.ones(2, 6).double(), initial_state=state, return_state=True, mask=mask
    )
    torch.testing.assert_close(end, final, rtol=0, atol=1e-11)
    for row in range(2):
        torch.testing.assert_close(y[row][:, mask[row]], whole[row] + u[row], rtol=0, atol=1e-11)
        assert (y[row][:, ~mask[row]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_states_in_fp32(dtype):
    low = [t.to(dtype) for t in inputs(2, 2, 300, 8, 4)[:5]]
    y, state = ops.selective_scan(*low, return_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    want, exact = reference.forward(*(t.double() for t in low), None)
    torch.testing.assert_close(state.double(), exact, rtol=1e-4, atol=1e-5)
    assert ((y.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-4).all()


def test_no_tokens():
    tensors = inputs(2, 2, 0, 4, 2)
    y, state = scan(*tensors)
    assert y.shape == (2, 2, 0, 4) and torch.equal(state, tensors[5])
    empty, _ = ops.selective_scan(*inputs(0, 2, 5, 4, 2)[:5], return_state=True)
    assert empty.shape == (0, 2, 5, 4)


def test_custom_op_rules_and_compilation():
    tensors = inputs(2, 2, 40, 4, 3)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(op.selective_scan, tuple(leaves))
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, tensors), gradients(scan, tensors), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 5, 4)}, "u must be"),
        ({1: torch.zeros(2, 2, 5, 3)}, "delta must be"),
        ({2: torch.zeros(2, 3, 3)}, "A must be"),
        ({3: torch.zeros(2, 1, 5, 3)}, "B must be"),
        ({4: torch.zeros(2, 2, 5, 2)}, "C must be"),
        ({4: torch.zeros(2, 2, 5, 3, dtype=torch.long)}, "C must be a floating-point"),
        ({"D": torch.zeros(4)}, "D must be"),
        ({"delta_bias": torch.zeros(2)}, "delta_bias must be"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, "initial_state must be"),
        ({"mask": torch.ones(2, 4)}, "mask must be"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool or int"),
    ],
)
def test_bad_input(change, message):
    operands = inputs(2, 2, 5, 4, 3)[:5]
    options = {key: value for key, value in change.items() if isinstance(key, str)}
    for number, value in change.items():
        if isinstance(number, int):
            operands[number] = value
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(*operands, **options)
