"""Fullgraph compile and export: neither the mask nor the layout may break the graph or wait for the device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask

import hf_attn
from hf_attn.integrations.transformers.masks import mask_kind
from tests.integrations.transformers.tiny import SIZES, assert_close, build, pair, tokens


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def inputs(kind: str) -> tuple[torch.Tensor, dict]:
    mask = torch.ones(2, 9, dtype=torch.long)
    if kind == "left":
        mask[0, :3] = 0
    elif kind == "right":
        mask[1, 6:] = 0
    if kind == "packed":
        return tokens(1, 9), {"position_ids": torch.cat([torch.arange(5), torch.arange(4)])[None]}
    if kind == "cu_seq_lens":
        cu = torch.tensor([0, 5, 9], dtype=torch.int32)
        return tokens(1, 9), {
            "position_ids": torch.cat([torch.arange(5), torch.arange(4)])[None],
            "cu_seq_lens_q": cu,
            "cu_seq_lens_k": cu,
        }
    return tokens(2, 9), {} if kind == "none" else {"attention_mask": mask}


@pytest.mark.parametrize("kind", ["none", "left", "right", "packed", "cu_seq_lens"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_fullgraph_equals_sdpa(model_type, kind):
    dense, ours = pair(model_type, **({"sliding_window": 4} if model_type == "mistral" else {}))
    ids, options = inputs(kind)
    got = compiled(ours)(ids, use_cache=False, **options).logits
    where = options.get("attention_mask", torch.ones_like(ids)).bool()
    assert_close(got, dense(ids, use_cache=False, **options).logits, where)


@torch.no_grad()
def test_compiled_calls_are_not_counted():
    """Recording is Python; inside a graph it would run once, at tracing time, and lie."""
    ours = build("llama", "hf_attn_exact")
    compiled(ours)(tokens(1, 9), use_cache=False)
    assert hf_attn.stats(ours)["layers"] == {}


@torch.no_grad()
def test_changed_options_are_seen_by_compiled_code():
    """The parsed options are a constant of the graph, guarded by the dict's content."""
    seen = []
    ours = build("llama", "hf_attn_exact", num_hidden_layers=1)
    ours.config.hf_attn = {"mechanism": "exact", "layers": {"0": None}}
    model = torch.compile(ours, backend=lambda graph, example: seen.append(str(graph.code)) or graph.forward)
    model(tokens(1, 9), use_cache=False)
    assert "scaled_dot_product_attention" in seen[-1]
    ours.config.hf_attn = {"mechanism": "exact"}
    model(tokens(1, 9), use_cache=False)
    assert "scaled_dot_product_attention" not in seen[-1]


@torch.no_grad()
def test_backward_through_a_compiled_model():
    dense, ours = pair("llama")
    ids, options = inputs("left")
    with torch.enable_grad():
        for model in (dense, torch.compile(ours, fullgraph=True, backend="aot_eager")):
            model(ids, labels=ids, use_cache=False, **options).loss.backward()
    for name, parameter in dense.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind", ["none", "left"])
@torch.no_grad()
def test_export(kind):
    dense, ours = pair("llama")
    ids, options = inputs(kind)
    program = torch.export.export(ours, (ids,), {"use_cache": False, **options}, strict=False)
    where = options.get("attention_mask", torch.ones_like(ids)).bool()
    assert_close(program.module()(ids, use_cache=False, **options).logits, dense(ids, **options).logits, where)


def test_image_blocks_in_compiled_code():
    """A compiler cannot see blocks inside an `and_mask`; types that may have them get the dense mask there."""
    config = AutoConfig.for_model("gemma3_text", **SIZES)
    embeds, blocks = torch.zeros(1, 5, 32), torch.tensor([[-1, 0, 0, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])

    def build_mask(implementation):
        config._attn_implementation = implementation
        return create_causal_mask(config, embeds, None, None, position_ids=positions, block_sequence_ids=blocks)

    want = build_mask("sdpa")
    for build_it in (build_mask, torch.compile(build_mask, fullgraph=True, backend="eager")):
        got = build_it("hf_attn_exact")
        assert mask_kind(got, 5, 5) == "pattern" and torch.equal(got.bool(), want)


def test_static_decode_compiles():
    """`generate` builds the mask outside and compiles the forward of one token."""
    dense, ours = pair("llama")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    want = dense.generate(tokens(2, 7), **options)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="eager")
    assert torch.equal(ours.generate(tokens(2, 7), **options), want)
