"""Paged decoding and streaming heads on a real GPU: numerics in all types and formats, graph capture, whole steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.mechanism import get_mechanism
from hf_attn.ops.hfattn_sparse.paged import Pages
from tests.budget import assert_as_good_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

FORMATS = [None, "int8", "int4", "int8-per-tensor"]
PAGE = 64


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def stored(x: Tensor, name: str | None) -> Pages:
    """Tokens `[B, H, N, D]` in pages."""
    encoded = KVFormat(name).encode(x, absmax_scale(x) if name == "int8-per-tensor" else None)
    return encoded.map(lambda t: t[:, :, 0].unflatten(2, (-1, PAGE)))


def case(name, dtype, *, dim=128, value_dim=128, pages=64, listed=16, group=4, per_head=True, batch=2, kv_heads=2):
    query = draw(batch, kv_heads * group, dim, dtype=dtype, seed=1)
    key, value = (draw(batch, kv_heads, pages * PAGE, d, dtype=dtype, seed=d + 2) for d in (dim, value_dim))
    heads = kv_heads * (group if per_head else 1)
    lists = torch.rand(batch, heads, pages - 1, device="cuda").topk(min(listed, pages) - 1).indices
    lists = torch.cat([lists, torch.full_like(lists[..., :1], pages - 1), torch.full_like(lists[..., :1], -1)], -1)
    length = torch.tensor([pages * PAGE - 5, pages * PAGE][:batch], device="cuda")
    return query, stored(key, name), stored(value, name), lists, length


def assert_right(monkeypatch, query, key, value, lists, length, **options) -> None:
    """As good as the torch path in the same type, with fp64 as the truth."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    eager = ops.paged_attention(query, key, value, lists, length=length, **options)
    wide = [x if x.bits else Pages(x.data.double()) for x in (key, value)]
    exact = dict(options)
    if "current" in options:
        exact["current"] = tuple(x.double() for x in options["current"])
    oracle = ops.paged_attention(query.double(), *wide, lists, length=length, **exact)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.paged_attention(query, key, value, lists, length=length, **options)
    # Weights and codes meet in the query's type: one more rounding of every weight than fp32 throughout.
    floor = 1e-5 if query.dtype == torch.float32 else 4 * torch.finfo(query.dtype).eps * float(oracle.abs().max())
    assert_as_good_as_eager(got, eager, oracle, slack=4, floor=floor)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("per_head", [True, False])
def test_formats(per_head, dtype, name, monkeypatch):
    arguments = case(name, dtype, per_head=per_head)
    assert_right(monkeypatch, *arguments)
    newest = (draw(2, 2, 128, dtype=dtype, seed=7), draw(2, 2, 128, dtype=dtype, seed=8))
    assert_right(monkeypatch, *arguments, current=newest)


@pytest.mark.parametrize(("dim", "value_dim", "group"), [(64, 64, 1), (80, 40, 3), (192, 128, 16), (256, 256, 8)])
@pytest.mark.parametrize("name", [None, "int4"])
def test_sizes(dim, value_dim, group, name, monkeypatch):
    options = {"dim": dim, "value_dim": value_dim, "group": group, "per_head": group == 3}
    assert_right(monkeypatch, *case(name, torch.bfloat16, **options))


def test_ring(monkeypatch):
    query, key, value, _, _ = case("int4", torch.bfloat16, pages=7)
    lists = torch.arange(7, device="cuda").expand(2, 2, 7)
    slots = torch.stack([torch.randperm(7 * PAGE, device="cuda") for _ in range(2)]).view(2, 7, PAGE)
    options = {"slots": slots, "window": (128, 256), "current": (draw(2, 2, 128, seed=7), draw(2, 2, 128, seed=8))}
    assert_right(monkeypatch, query, key, value, lists, torch.tensor([440, 448], device="cuda"), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_statistics_scores_and_selections(dtype, monkeypatch):
    key, query = draw(2, 2, 20_000, 128, dtype=dtype), draw(2, 8, 128, dtype=dtype, seed=1)
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        stats, count = ops.page_statistics(key, page_size=PAGE, logical_page_size=16)
        found[backend] = stats, count, ops.page_scores(query, stats)
    assert torch.equal(found["torch"][0], found["triton"][0]) and torch.equal(found["torch"][1], found["triton"][1])
    torch.testing.assert_close(found["torch"][2], found["triton"][2], rtol=1e-5, atol=1e-3)
    last = torch.tensor([311, 200], device="cuda")
    chosen = [ops.select_pages(scores, last, count=63).sort(-1).values for _, _, scores in found.values()]
    # Scores summed in another order may swap neighbours in rank.
    assert (chosen[0] != chosen[1]).any(-1).float().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_and_window(packed, dtype, monkeypatch):
    tensors = [draw(1, h, 3001, 128, dtype=dtype, seed=h) for h in (8, 2, 2)]
    options = {"sinks": 100, "window": 700}
    if packed:
        options["cu_seqlens_q"] = torch.tensor([0, 900, 901, 3001], device="cuda")
    monkeypatch.setenv("HF_ATTN_BACKEND", "torch")
    eager = ops.sink_window_attention(*tensors, **options)
    oracle = ops.sink_window_attention(*(t.double() for t in tensors), **options)
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    got = ops.sink_window_attention(*tensors, **options)
    assert_as_good_as_eager(got, eager, oracle, slack=2)


def test_graph_capture(monkeypatch):
    """Statistics, scores, selection and attention in one graph: nothing waits for the device."""
    monkeypatch.setenv("HF_ATTN_BACKEND", "triton")
    query, key, value, _, length = case(None, torch.bfloat16)

    def step() -> Tensor:
        stats, _ = ops.page_statistics(key.data.flatten(2, 3), page_size=PAGE, logical_page_size=16)
        last = (length - 1) // PAGE
        chosen = ops.select_pages(ops.page_scores(query, stats), last, count=15)
        lists = torch.cat([chosen, last[:, None, None].expand(-1, chosen.shape[1], 1)], -1)
        return ops.paged_attention(query, key, value, lists, length=length)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kv_quant", [None, "int4", "int8-per-tensor"])
@pytest.mark.parametrize("group_select", ["per_query_head", "group_max"])
def test_steps_of_lserve(group_select, kv_quant, monkeypatch):
    """Whole decoding steps over both kinds of heads equal those of the torch path."""
    mechanism = get_mechanism("lserve")
    settings = {"token_budget": 512, "min_seq_len": 0, "heads": [[1, 0, 1, 0]], "dec_sink": 64, "dec_local": 128}
    options = {**settings, "kv_quant": kv_quant, "group_select": group_select, "ctx_sink": 64, "ctx_local": 256}
    config = mechanism.config.from_dict(options)
    query, key, value = (draw(1, h, 2006, 128, dtype=torch.float32, seed=h + n) for n, h in enumerate((16, 4, 4)))
    outs = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HF_ATTN_BACKEND", backend)
        store = mechanism.store(config, 0, 4)
        store.append(key[:, :, :2000], value[:, :, :2000], None)
        outs[backend] = []
        for t in range(2000, 2006):
            new = slice(t, t + 1)
            layer = LayerContext(index=0, count=1, cache=store)
            parts = (x[:, :, new] for x in (query, key, value))
            call = AttentionCall(*parts, 128**-0.5, True, TokenLayout.full(1, 1, t + 1), layer)
            outs[backend].append(mechanism(call, config))
    torch.testing.assert_close(torch.cat(outs["triton"]), torch.cat(outs["torch"]), rtol=1e-4, atol=1e-4)
    counts = ops.path_counts()
    assert counts["paged_attention | triton"] == 12 and counts["page_scores | triton"] >= 1
