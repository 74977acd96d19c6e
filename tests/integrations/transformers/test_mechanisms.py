"""The real mechanisms inside a model: padded = unpadded, packed = separate, chunked = cached = whole, to rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_attn
from tests.integrations.transformers.tiny import assert_close, build, cache_argument, tokens

SPARSE = {
    "moba": {"block_size": 4, "top_k": 2, "decode": "moba", "min_seq_len": 0},
    "streaming": {"block_size": 4, "window": 5, "num_sinks": 2},
}


@pytest.fixture(params=list(SPARSE))
def model(request):
    """A tiny Qwen3 whose mechanism drops most of 23 tokens."""
    return hf_attn.apply(build("qwen3"), request.param, **SPARSE[request.param])


@torch.no_grad()
def test_it_is_sparse_and_counted(model):
    dense = build("qwen3")
    assert (model(tokens(1, 23)).logits - dense(tokens(1, 23)).logits).abs().max() > 1e-2
    totals = hf_attn.stats(model)["totals"]
    assert totals["sparse_calls"] == totals["calls"] == 2 and 0.2 < totals["density"] < 0.8


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_unpadded_ones(model, side):
    ids, mask = tokens(3, 23), torch.ones(3, 23, dtype=torch.long)
    for row, pads in ((0, 6), (2, 17)):
        mask[row, slice(0, pads) if side == "left" else slice(23 - pads, 23)] = 0
    got = model(ids, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        assert_close(got[row, real], model(ids[row, real][None]).logits[0])


@torch.no_grad()
def test_packed_rows_equal_separate_ones(model):
    ids, lengths = tokens(1, 23), [9, 1, 13]
    want = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 9, 10, 23], dtype=torch.int32)
    assert_close(model(ids, position_ids=positions, use_cache=False).logits, want)
    assert_close(model(ids, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits, want)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pads", [0, 3])
@torch.no_grad()
def test_chunks_and_decode_equal_the_whole(model, static, pads):
    ids, mask = tokens(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[0, :pads] = 0
    want = model(ids, attention_mask=mask).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    got = []
    for start, end in ((0, 5), (5, 16), (16, 21), (21, 22), (22, 23)):
        got.append(model(ids[:, start:end], attention_mask=mask[:, :end], **cache_argument(model, cache)).logits)
    assert_close(torch.cat(got, 1), want, mask.bool())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_with_and_without_cache(model, options):
    ids, mask = tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :4] = 0
    shared = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, use_cache=False, **shared, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(model.generate(ids, **shared, **options), want)


def test_a_training_step(model):
    """Packed training with gradient checkpointing: finite gradients in every weight."""
    ids = tokens(1, 23)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    model.train().gradient_checkpointing_enable()
    model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
