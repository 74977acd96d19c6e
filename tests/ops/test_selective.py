"""Selective attention: against the dense mask, gradients, and heads that chose nothing or everything."""

from __future__ import annotations

import pytest
import torch

from hf_attn import ops
from hf_attn.ops.hfattn_sparse.selective import reference
from tests.budget import assert_as_good_as_eager


def _inputs(rows, heads, group, length, dim=8, width=12, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads * group, length, dim), (rows, heads, length, dim), (rows, heads, length, width)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return tensors, torch.rand(rows, heads, length, generator=generator) < share


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 33, 257])
def test_gathered_equals_masked(length, group, causal):
    tensors, selected = _inputs(2, 3, group, length)
    selected[0, 0], selected[1, 1] = False, True  # nothing, everything
    results = []
    for inputs, run in (
        (tensors, lambda *t: ops.selective_attention(*t, selected, causal=causal)),
        (tensors, lambda *t: reference.forward(*t, selected, causal, 8**-0.5)),
        ([t.double() for t in tensors], lambda *t: reference.forward(*t, selected, causal, 8**-0.5)),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(*leaves)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * cotangent).sum(), leaves)])
    for name, got, eager, oracle in zip(("out", "query", "key", "value"), *results, strict=True):
        assert_as_good_as_eager(got, eager, oracle, slack=4, floor=1e-6, what=name)
    assert not results[0][0][0, :group].any()


def test_tokens_that_were_not_chosen_are_never_read():
    tensors, selected = _inputs(1, 2, 2, 20)
    clean = ops.selective_attention(*tensors, selected)
    for tensor, value in zip(tensors[1:], (float("nan"), float("inf")), strict=True):
        tensor[~selected] = value
    assert torch.equal(ops.selective_attention(*tensors, selected), clean)


def test_compiles_whole_and_passes_opcheck():
    tensors, selected = _inputs(1, 2, 2, 20)
    compiled = torch.compile(ops.selective_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors, selected), ops.selective_attention(*tensors, selected))
    from hf_attn.ops.hfattn_sparse.selective.op import selective_attention as op

    torch.library.opcheck(op, (*(t.requires_grad_() for t in tensors), selected, True, 0.5))


@pytest.mark.parametrize("bad", ["shape", "dtype", "keys"])
def test_bad_input_is_named(bad):
    (query, key, value), selected = _inputs(1, 2, 2, 20)
    if bad == "keys":
        query = query[:, :, :5]
    selected = {"shape": selected[:, :1], "dtype": selected.float(), "keys": selected}[bad]
    with pytest.raises(ValueError, match="as many keys" if bad == "keys" else "selected must be bool"):
        ops.selective_attention(query, key, value, selected)
