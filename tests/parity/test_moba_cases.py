"""The MoBA adapter on other cases of the golden file's format, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.parity import moba


def by_hand(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, size: int, top_k: int) -> tuple[Tensor, ...]:
    """One sequence `[L, H, D]`: convolved keys, output, and bool `[H, L, n]` of chosen blocks (spec 2.1 to 2.5)."""
    length, kv_heads, dim = key.shape
    width = weight.shape[1]
    rows = []
    for t in range(length):
        taps = sum(weight[:, width - 1 - l].view(kv_heads, dim) * key[t - l] for l in range(min(width, t + 1)))
        rows.append(key[t] + F.silu(taps))
    keys = torch.stack(rows)
    group, blocks = query.shape[1] // kv_heads, -(-length // size)
    out, chosen = (
        torch.zeros_like(query[..., :1]).repeat(1, 1, value.shape[2]),
        torch.zeros(query.shape[1], length, blocks, dtype=torch.bool),
    )
    means = torch.stack([keys[i * size : (i + 1) * size].mean(0) for i in range(blocks)]).detach()
    for head in range(query.shape[1]):
        for t in range(length):
            own = t // size
            scores = means[:own, head // group] @ query[t, head].detach()
            best = sorted(range(own), key=lambda i: (-scores[i].item(), -i))[: top_k - 1]
            chosen[head, t, [own, *best]] = True
            visible = [j for i in [own, *best] for j in range(i * size, min((i + 1) * size, length)) if j <= t]
            weights = (keys[visible, head // group] @ query[t, head] * dim**-0.5).softmax(0)
            out[t, head] = out[t, head] + weights @ value[visible, head // group]
    return keys, out, chosen


@pytest.mark.parametrize(
    ("lengths", "size", "top_k", "heads", "kv_heads", "width"),
    [([23, 1, 17], 7, 3, 4, 2, 5), ([1, 12], 5, 2, 3, 3, 3), ([30], 4, 4, 6, 2, 3)],
)
def test_key_convolution_case(lengths, size, top_k, heads, kv_heads, width):
    total, dim = sum(lengths), 6
    inputs = {
        "q": torch.randn(total, heads, dim),
        "k": torch.randn(total, kv_heads, dim),
        "v": torch.randn(total, kv_heads, dim),
        "dout": torch.randn(total, heads, dim),
        "kconv_weight": torch.randn(kv_heads * dim, width) * 0.5,
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "snr_in": torch.tensor([[1.0, 64, 128, 64, 8]], dtype=torch.float64),
    }
    config = {"block_size": size, "top_k": top_k, "num_heads": heads, "num_kv_heads": kv_heads, "kconv_width": width}
    names = ("q", "k", "v", "kconv_weight")
    exact = {name: inputs[name].double().requires_grad_() for name in names}
    parts = [exact[name].split(lengths) for name in "qkv"]
    results = [by_hand(q, k, v, exact["kconv_weight"], size, top_k) for q, k, v in zip(*parts, strict=True)]
    out = torch.cat([result[1] for result in results])
    (out * inputs["dout"]).sum().backward()

    got = moba.run(inputs, config)
    torch.testing.assert_close(got["kconv_k"].double(), torch.cat([r[0] for r in results]), rtol=0, atol=2e-5)
    torch.testing.assert_close(got["kconv_out"].double(), out, rtol=0, atol=2e-5)
    start = 0
    for length, (_, _, chosen) in zip(lengths, results, strict=True):
        mine = got["kconv_select"][:, start : start + length].bool()
        assert torch.equal(mine[..., : chosen.shape[2]], chosen) and not mine[..., chosen.shape[2] :].any()
        start += length
    for name, found in zip(names, ("kconv_dq", "kconv_dk", "kconv_dv", "kconv_dweight"), strict=True):
        torch.testing.assert_close(got[found].double(), exact[name].grad, rtol=0, atol=5e-5)
