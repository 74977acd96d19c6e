"""Both mechanisms under torch.compile and torch.export: one graph for every length, forward, backward and decode."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import CompileConfig

import hf_attn
from tests.integrations.transformers.modes import MECHANISMS, equal, sparse
from tests.integrations.transformers.tiny import assert_close, build, tokens

LENGTHS = (23, 32, 41, 57, 64)


@pytest.fixture(autouse=True)
def fresh_compiler(sparse_path):
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs(length: int, padded: bool) -> tuple[torch.Tensor, dict]:
    if not padded:
        return tokens(2, length), {}
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    return tokens(2, length), {"attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_one_graph_for_every_length(name, padded):
    ours, frames = sparse(name), CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=frames)
    for length in LENGTHS:
        ids, options = inputs(length, padded)
        where = options.get("attention_mask", torch.ones_like(ids)).bool()
        assert_close(compiled(ids, use_cache=False, **options).logits, ours(ids, **options).logits, where)
    assert frames.frame_count == 1


@pytest.mark.parametrize("how", ["marked", "automatic"])
@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_lengths_become_dynamic(name, how):
    """mark_dynamic gives one graph at once; without it the second length makes the second and last one."""
    ours, frames = sparse(name), CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=frames)
    for length in LENGTHS:
        ids = tokens(2, length)
        if how == "marked":
            torch._dynamo.mark_dynamic(ids, 1)
        compiled(ids, use_cache=False)
    assert frames.frame_count == (1 if how == "marked" else 2)


@torch.no_grad()
def test_the_dense_threshold_makes_one_more_graph(monkeypatch):
    """Below `min_seq_len` MoBA is another computation: one graph on each side, whatever the number of lengths."""
    monkeypatch.delenv("HF_ATTN_BACKEND")
    ours, frames = sparse("moba", min_seq_len=40), CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=frames)
    for length in (*LENGTHS, *LENGTHS):
        assert_close(compiled(tokens(2, length), use_cache=False).logits, ours(tokens(2, length)).logits)
    assert frames.frame_count == 2


@pytest.mark.parametrize("name", MECHANISMS)
def test_backward_of_every_length(name):
    dense, ours = equal(name)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS[:3]:
        ids, options = inputs(length, padded=True)
        labels = ids.masked_fill(options["attention_mask"] == 0, -100)
        for model, run in ((dense, dense), (ours, compiled)):
            model.zero_grad()
            run(ids, labels=labels, use_cache=False, **options).loss.backward()
        for key, parameter in dense.named_parameters():
            assert_close(ours.get_parameter(key).grad, parameter.grad)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_export_with_a_free_length(name):
    ours = sparse(name)
    shapes = {"input_ids": {1: torch.export.Dim("length", min=9, max=100)}, "use_cache": None}
    program = torch.export.export(ours, (tokens(2, 23),), {"use_cache": False}, dynamic_shapes=shapes, strict=False)
    for length in LENGTHS[:3]:
        ids = tokens(2, length)
        assert_close(program.module()(ids, use_cache=False).logits, ours(ids).logits)


def compiled_decode(model, ids, mask) -> torch.Tensor:
    """`generate` with a static cache and its own compilation of the decode step, as on an accelerator."""
    config = CompileConfig(fullgraph=True, dynamic=None, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("decode", ["moba", "full", None], ids=["moba", "moba, full decode", "streaming"])
def test_static_decode(decode):
    """One graph for the decode step of all positions, and the tokens of uncompiled decoding."""
    ours = sparse("streaming") if decode is None else sparse("moba", decode=decode)
    ids, mask = inputs(23, padded=True)[0], inputs(23, padded=True)[1]["attention_mask"]
    want = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    hf_attn.reset_stats(ours)
    assert torch.equal(compiled_decode(ours, ids, mask), want)
    # 2 layers of prefill are counted, the graph's calls are not.
    assert hf_attn.stats(ours)["totals"]["calls"] == 2
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", MECHANISMS)
def test_static_decode_equals_sdpa(name):
    dense, ours = equal(name)
    ids, mask = inputs(23, padded=True)[0], inputs(23, padded=True)[1]["attention_mask"]
    assert torch.equal(compiled_decode(ours, ids, mask), compiled_decode(dense, ids, mask))


@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_autocast_inside_a_graph(name):
    dense, ours = equal(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 23)
    exact = dense(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        allowed = 2 * (dense(ids).logits.float() - exact).abs().max()
        assert (compiled(ids, use_cache=False).logits.float() - exact).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_inductor(name):
    """The default compiler: same numbers, one graph."""
    ours = sparse(name)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for length in LENGTHS[:3]:
        assert_close(compiled(tokens(2, length), use_cache=False).logits, ours(tokens(2, length)).logits)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_compiled_dense_layers():
    """Layers left dense by `layers` compile too, and follow lengths."""
    ours, frames = hf_attn.apply(build("llama"), "streaming", layers={"0": None}), CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=frames)
    for length in LENGTHS[:3]:
        assert_close(compiled(tokens(2, length), use_cache=False).logits, ours(tokens(2, length)).logits)
    assert frames.frame_count == 1
