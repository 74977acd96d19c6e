"""natten's names: signatures, layouts, merging and modules, against the ops and against plain attention."""

from __future__ import annotations

import inspect

import pytest
import torch

from hf_attn import natten, ops


@pytest.mark.parametrize(("rank", "space"), [(1, (9,)), (2, (6, 7)), (3, (4, 3, 5))])
def test_fused_names(rank, space):
    query, key, value = (torch.randn(2, *space, 2, 8) for _ in range(3))
    function = getattr(natten, f"na{rank}d")
    out, lse = function(query, key, value, 3, 2, 1, False, 0.4, return_lse=True, backend="cutlass-fna")
    window = {"kernel_size": 3, "stride": 2, "scale": 0.4, "return_lse": True}
    expected = ops.neighborhood_attention(query, key, value, **window)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    positional = ["query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale"]
    assert list(inspect.signature(function).parameters)[:8] == positional
    assert function(query, key, value, kernel_size=3, is_causal=None).shape == value.shape
    with pytest.raises(TypeError, match="unexpected argument 'kernel'"):
        function(query, key, value, kernel_size=3, kernel=3)
    with pytest.raises(ValueError, match=f"na{rank}d takes"):
        function(query[0], key[0], value[0], kernel_size=3)


@pytest.mark.parametrize(("rank", "space"), [(1, (9,)), (2, (6, 7)), (3, (4, 3, 5))])
def test_names_of_older_releases(rank, space):
    query, key, value = (torch.randn(2, 2, *space, 8) for _ in range(3))
    rpb = torch.randn(2, *[5] * rank)
    scores = getattr(natten, f"natten{rank}dqkrpb")(query, key, rpb, 3, 1)
    assert torch.equal(scores, ops.na_qk(query, key, rpb=rpb, kernel_size=3))
    assert torch.equal(scores, getattr(natten, f"na{rank}d_qk")(query, key, 3, rpb=rpb))
    plain = getattr(natten, f"natten{rank}dqk")(query, key, 3)
    assert torch.equal(plain, getattr(natten, f"na{rank}d_qk")(query, key, 3))
    weights = scores.softmax(-1)
    mixed = getattr(natten, f"natten{rank}dav")(weights, value, 3, 1)
    assert torch.equal(mixed, getattr(natten, f"na{rank}d_av")(weights, value, 3))
    heads_last = (x.movedim(1, -2) for x in (query, key, value))
    fused = ops.neighborhood_attention(*heads_last, kernel_size=3, rpb=rpb, scale=1.0)
    torch.testing.assert_close(mixed, fused.movedim(-2, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_merging(causal):
    query, key, value = (torch.randn(1, 20, h, 8) for h in (4, 2, 2))
    out, lse = natten.attention(query, key, value, is_causal=causal, return_lse=True)
    torch.testing.assert_close(out, natten.attention(query, key, value, is_causal=causal), rtol=1e-5, atol=1e-6)
    if causal:
        return
    parts = [natten.attention(query, key[:, s], value[:, s], return_lse=True) for s in (slice(7), slice(7, 20))]
    merged, merged_lse = natten.merge_attentions([p[0] for p in parts], [p[1] for p in parts], torch_compile=True)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "space"), [(1, (9,)), (2, (6, 7)), (3, (4, 3, 5))])
@pytest.mark.parametrize("bias", [False, True])
def test_modules(rank, space, bias):
    layer = getattr(natten, f"NeighborhoodAttention{rank}D")(16, 4, kernel_size=3, rel_pos_bias=bias, qk_scale=0.3)
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(layer.state_dict()) == names | ({"rpb"} if bias else set())
    x = torch.randn(2, *space, 16)
    out = layer(x)
    query, key, value = (part.unflatten(-1, (4, 4)) for part in layer.qkv(x).chunk(3, -1))
    inner = ops.neighborhood_attention(query, key, value, kernel_size=3, scale=0.3, rpb=layer.rpb, backend="reference")
    torch.testing.assert_close(out, layer.proj(inner.flatten(-2)), rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(ValueError, match="takes \\[B"):
        layer(x[0])


def test_module_refuses_ragged_heads():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 10 and 4"):
        natten.NeighborhoodAttention2D(10, 4, 3)
