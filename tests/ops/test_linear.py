"""Linear attention: against the dense form, through states, masks and packing, and what it refuses."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from hf_attn import ops
from hf_attn.ops import linear
from hf_attn.ops.hfattn_sparse.linear import reference, torch_path
from tests.budget import assert_as_good_as_eager

# rows, heads, tokens, D, E, block
SHAPES = [
    (2, 3, 70, 16, 24, 16),
    (1, 2, 1, 8, 8, 64),
    (1, 1, 7, 4, 5, 64),
    (2, 2, 64, 8, 8, 64),
    (1, 4, 1300, 8, 16, 32),
]


def _inputs(rows, heads, length, dim, width, dtype=torch.float32, every_token=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, dim)] * 2 + [(rows, heads, length, width), (rows, heads, dim, width)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    slopes = torch.rand((rows, heads, length) if every_token else heads, generator=generator)
    if not every_token:
        slopes[0] = 1e-5  # a head that hardly forgets
    return *tensors, slopes


def _gradients(run, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, state = run(*leaves)
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in (out, state)]
    grads = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), leaves)
    return out.detach(), state.detach(), *grads


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_give_the_dense_form_and_its_gradients(shape, every_token):
    *tensors, slopes = _inputs(*shape[:5], every_token=every_token)

    def blocked(q, k, v, s):
        return ops.linear_attention(q, k, v, slopes, scale=0.5, initial_state=s, return_state=True, block_size=shape[5])

    def dense(q, k, v, s):
        return reference.forward(q, k, v, slopes, s, 0.5)

    oracle = _gradients(dense, [t.double() for t in tensors])
    names = ("out", "state", "query", "key", "value", "initial_state")
    for name, got, eager, exact in zip(
        names, _gradients(blocked, tensors), _gradients(dense, tensors), oracle, strict=True
    ):
        assert_as_good_as_eager(got, eager, exact, slack=4, what=name)
    for got, exact in zip(_gradients(blocked, [t.double() for t in tensors]), oracle, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-10 * max(float(exact.abs().max()), 1))


@pytest.mark.parametrize("block", [1, 3, 16, 64, 256])
def test_block_size_changes_nothing_in_fp64(block):
    *tensors, slopes = _inputs(1, 2, 150, 8, 8, torch.float64)
    got = ops.linear_attention(*tensors[:3], slopes, block_size=block)
    torch.testing.assert_close(got, reference.forward(*tensors[:3], slopes, None, 1.0)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 30, 64, 65, 129])
def test_a_sequence_continues_from_its_state(cut):
    *tensors, slopes = _inputs(2, 2, 130, 8, 8)
    q, k, v, state = tensors
    whole, final = ops.linear_attention(q, k, v, slopes, initial_state=state, return_state=True)
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part, state = ops.linear_attention(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], slopes, initial_state=state, return_state=True
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))
    torch.testing.assert_close(state, final, rtol=0, atol=2e-6 * float(final.abs().max()))


def test_token_by_token_is_the_same_sequence():
    *tensors, slopes = _inputs(1, 3, 90, 8, 8)
    q, k, v, _ = tensors
    state, parts = None, []
    for t in range(90):
        one = slice(t, t + 1)
        part, state = ops.linear_attention(
            q[:, :, one], k[:, :, one], v[:, :, one], slopes, initial_state=state, return_state=True
        )
        parts.append(part)
    whole, final = ops.linear_attention(q, k, v, slopes, return_state=True)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))
    torch.testing.assert_close(state, final, rtol=0, atol=2e-6 * float(final.abs().max()))


def test_padding_anywhere_neither_decays_nor_adds():
    q, k, v, state, slopes = _inputs(3, 2, 40, 8, 8, torch.float64)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :9], mask[1, 31:], mask[2, 10:17] = 0, 0, 0
    k[mask[:, None].expand(-1, 2, -1) == 0] = float("nan")
    v[mask[:, None].expand(-1, 2, -1) == 0] = float("inf")
    out, final = ops.linear_attention(q, k, v, slopes, initial_state=state, return_state=True, mask=mask, block_size=16)
    for row in range(3):
        real = mask[row].bool()
        picked = [t[row : row + 1][:, :, real] for t in (q, k, v)]
        alone, last = ops.linear_attention(
            *picked, slopes, initial_state=state[row : row + 1], return_state=True, block_size=16
        )
        torch.testing.assert_close(out[row : row + 1][:, :, real], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(final[row : row + 1], last, rtol=0, atol=1e-10)
    # A token that is not real reads the unchanged state.
    expected = torch.einsum("hd,hde->he", q[1, :, 35], final[1])
    torch.testing.assert_close(out[1, :, 35], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_packed_sequences_are_separate_ones(backend, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    *tensors, slopes = _inputs(1, 2, 50, 8, 8, torch.float64)
    q, k, v, _ = tensors
    cu = torch.tensor([0, 7, 7, 50])
    state = torch.randn(3, 2, 8, 8, dtype=torch.float64)

    def packed(q, k, v, s):
        return ops.linear_attention(q, k, v, slopes, initial_state=s, return_state=True, cu_seqlens=cu, block_size=16)

    def separate(q, k, v, s):
        outs = [
            ops.linear_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], slopes, initial_state=s[i : i + 1], return_state=True
            )
            for i, (a, b) in enumerate([(0, 7), (7, 7), (7, 50)])
        ]
        return torch.cat([o for o, _ in outs], 2), torch.cat([f for _, f in outs])

    for got, wanted in zip(_gradients(packed, [q, k, v, state]), _gradients(separate, [q, k, v, state]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_key_heads_are_repeated():
    q, k, v, _, slopes = _inputs(1, 4, 33, 8, 8)
    few = ops.linear_attention(q, k[:, :2], v[:, :2], slopes)
    many = ops.linear_attention(q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]], slopes)
    assert torch.equal(few, many)


def test_half_precision_keeps_an_exact_state():
    *tensors, slopes = _inputs(1, 4, 300, 16, 16, torch.bfloat16)
    out, state = ops.linear_attention(*tensors[:3], slopes, return_state=True)
    exact, _ = reference.forward(*(t.double() for t in tensors[:3]), slopes, None, 1.0)
    assert state.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() / exact.norm() <= 1e-2


def test_steep_heads_meet_no_overflow_and_no_subnormal_numbers():
    q, k, v, _, _ = _inputs(1, 2, 600, 8, 8)
    slopes = torch.tensor([8.0, 700.0])
    out, state = ops.linear_attention(q, k, v, slopes, return_state=True, block_size=256)
    exact, last = reference.forward(q.double(), k.double(), v.double(), slopes, None, 1.0)
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    decays = torch_path._decays(torch.arange(1.0, 257)[None, None] * 0.84, 1)
    assert all(float(d[d > 0].min()) >= torch.finfo(torch.float32).tiny ** 0.5 for d in decays)


def test_memory_is_linear():
    """No tensor grows with the square of the length: the largest allocation of 16k tokens is four times that of 4k."""
    from torch.profiler import ProfilerActivity, profile

    largest = []
    for length in (4096, 16384):
        q, k, v = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            ops.linear_attention(q, k, v, torch.tensor([0.1])).sum().backward()
        largest.append(max(abs(event.self_cpu_memory_usage) for event in run.events()))
    assert largest[1] <= 4.5 * largest[0]


def test_compiles_whole_and_passes_opcheck():
    *tensors, slopes = _inputs(1, 2, 70, 8, 8)
    q, k, v, state = (t.requires_grad_() for t in tensors)

    def run(q, k, v, state):
        return ops.linear_attention(q, k, v, slopes, initial_state=state, return_state=True)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(q, k, v, state), run(q, k, v, state), strict=True):
        assert torch.equal(got, wanted)
    from hf_attn.ops.hfattn_sparse.linear.op import linear_attention as op

    torch.library.opcheck(op, (q, k, v, slopes, state, None, 1.0, 16))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"slopes": torch.rand(3)}, "slopes"),
        ({"slopes": torch.tensor([0.1, -0.1])}, "log-decays"),
        ({"slopes": torch.tensor([0.1, math.inf])}, "log-decays"),
        ({"key": torch.randn(1, 2, 9, 4)}, "head_dim"),
        ({"key": torch.randn(1, 2, 8, 8), "value": torch.randn(1, 2, 8, 8)}, "as many keys"),
        ({"initial_state": torch.zeros(2, 2, 8, 8)}, "initial_state"),
        ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 9)}, "bool or int"),
        ({"cu_seqlens": torch.tensor([0, 5, 8])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 9]), "mask": torch.ones(1, 9, dtype=torch.bool)}, "not both"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_bad_input_is_named(change, word):
    arguments = {name: torch.randn(1, 2, 9, 8) for name in ("query", "key", "value")} | {"slopes": torch.rand(2)}
    with pytest.raises(ValueError, match=word):
        ops.linear_attention(**{**arguments, **change})


@pytest.mark.parametrize("every_token", [False, True])
def test_arguments_of_flash_linear_attention(every_token, monkeypatch):
    """Its operator by a stand-in with the same signature and layout: `[B, T, H, D]`, gates instead of slopes."""
    seen = {}

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                         cu_seqlens=None):  # fmt: skip
        seen.update(scale=scale, output_final_state=output_final_state)
        slopes = -g.transpose(1, 2) if g is not None else -g_gamma
        out, state = reference.forward(*(t.transpose(1, 2) for t in (q, k, v)), slopes, initial_state, scale)
        return out.transpose(1, 2), state

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = chunk_simple_gla
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    *tensors, slopes = _inputs(2, 3, 20, 8, 12, every_token=every_token)
    want = ops.linear_attention(*tensors[:3], slopes, scale=0.3, initial_state=tensors[3], return_state=True)
    got = linear._by_fla(*(OnGpu(t) for t in tensors[:3]), slopes, tensors[3], None, 0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert seen == {"scale": 0.3, "output_final_state": True}


def test_flash_linear_attention_where_it_cannot_run():
    *tensors, slopes = _inputs(1, 1, 4, 4, 4)
    with pytest.raises(RuntimeError, match="backend='fla' needs tensors on a GPU, got 'cpu'"):
        ops.linear_attention(*tensors[:3], slopes, backend="fla")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'fla', got 'cuda'"):
        ops.linear_attention(*tensors[:3], slopes, backend="cuda")


class OnGpu:
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor):
        self.tensor = tensor

    def transpose(self, *dims):
        return self.tensor.transpose(*dims)


def test_kept_decays_are_those_of_the_slopes():
    """Decays and buffers outlive a call: slopes that change in place, other dtypes and block sizes, many heads."""
    for number in range(3):
        for dtype in (torch.float32, torch.float64):
            *tensors, slopes = _inputs(1, 70, 40, 4, 6, dtype, seed=number)
            for block, factor in ((16, 1.0), (16, 3.0), (8, 1.0)):
                slopes.mul_(factor)
                with torch.inference_mode(number == 1):
                    got = ops.linear_attention(
                        *tensors[:3], slopes, initial_state=tensors[3], return_state=True, block_size=block
                    )
                want = reference.forward(*(t.double() for t in tensors[:3]), slopes, tensors[3].double(), 1.0)
                for one, other in zip(got, want, strict=True):
                    torch.testing.assert_close(
                        one.double(), other, rtol=0, atol=1e-9 if dtype is torch.float64 else 1e-4
                    )
    assert len(torch_path._KEPT.__dict__[f"decays of {torch.float32}"]) <= torch_path._KEPT_DECAYS
