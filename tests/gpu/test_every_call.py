"""Every Triton op on a real GPU: the representative call of each against the torch path, types and layouts in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_attn.bench.kernel_calls import Shape, _find, available_calls
from tests.budget import assert_as_good_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

CALLS = {call.name: call for call in available_calls()}
SHAPES = {
    "bf16 128": Shape(torch.bfloat16, 128),
    "bf16 64": Shape(torch.bfloat16, 64, causal=False, bias=True),
    "bf16 128 packed": Shape(torch.bfloat16, 128, index=True),
    "fp16 128": Shape(torch.float16, 128),
    "fp32 64": Shape(torch.float32, 64),
    "bf16 256": Shape(torch.bfloat16, 256),
}


def tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_as_good_as_the_torch_path(name, shape):
    call, shape = CALLS[name], replace(SHAPES[shape], device="cuda")
    arguments = call.arguments(shape)
    got = tensors(call.run(shape, arguments))
    eager, exact = tensors(_find(call.like)(*arguments)), tensors(call.exact(arguments))
    torch.cuda.synchronize()
    for number, (mine, plain, right) in enumerate(zip(got, eager, exact, strict=True)):
        if not mine.is_floating_point():
            if "blocks" in name:
                blocks = int(torch.maximum(mine.max(), right.max())) + 1
                mine, right = members(mine, blocks), members(right, blocks)
            # A last digit of a score decides between neighbours in rank.
            assert (mine != right).float().mean() <= 5e-3, f"{name}: result {number}"
        elif mine.numel():
            # In fp32 come sums (log-sum-exp, states, gradients of slopes and biases): their terms have the input's
            # precision, their sums another order.
            share = {torch.float32: 2e-5}.get(shape.dtype, torch.finfo(shape.dtype).eps / 2)
            floor = share * float(right.nan_to_num(0, 0, 0).abs().max()) * (mine.dtype == torch.float32)
            assert_as_good_as_eager(mine, plain.to(mine.dtype), right, slack=3, floor=floor, what=f"{name} {number}")


def members(lists: Tensor, blocks: int) -> Tensor:
    """bool [..., blocks]: whether the list, -1 padded, names the block; another length would shift all entries."""
    found = torch.zeros(*lists.shape[:-1], blocks + 1, dtype=torch.bool, device=lists.device)
    return found.scatter_(-1, lists.long() + 1, True)[..., 1:]
