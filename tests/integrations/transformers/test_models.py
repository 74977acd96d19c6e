"""Logits and tokens of every compact model type equal SDPA's, however the host describes its tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_attn
from hf_attn.integrations.transformers.masks import COMPACT_OK
from tests.integrations.transformers.tiny import assert_close, build, cache_argument, pair, tokens

# Types with their own options in the tests below; the rest run the mask scenarios only.
MAIN = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text", "gpt2", "opt", "gpt_neox"]
# Encoders, encoder-decoders and multimodal parts have their own inputs: tests/compatibility compares those.
ELSEWHERE = {
    "bart",
    "bert",
    "clip_text_model",
    "deepseek_v3",
    "modernbert",
    "moh_vit",
    "qwen2_vl_text",
    "vit",
    "whisper",
}
MASKED = sorted(COMPACT_OK - ELSEWHERE)


def called(model) -> int:
    return hf_attn.stats(model)["totals"]["calls"]


def dense_reasons(model) -> dict[str, int]:
    return hf_attn.stats(model)["totals"]["dense_reasons"]


@pytest.mark.parametrize("model_type", MASKED)
@torch.no_grad()
def test_prefill_equals_sdpa(model_type):
    """No mask, all ones, left padding, right padding, in one pass over each type."""
    dense, ours = pair(model_type)
    ids = tokens(2, 11)
    masks = {name: torch.ones(2, 11, dtype=torch.long) for name in ("ones", "left", "right")}
    masks["left"][0, :4] = 0
    masks["right"][1, 7:] = 0
    assert_close(ours(ids).logits, dense(ids).logits)
    for mask in masks.values():
        got, want = ours(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits
        assert_close(got, want, mask.bool())
    assert called(ours) == 4 * ours.config.num_hidden_layers
    assert all("sliding window" in reason for reason in dense_reasons(ours))


@pytest.mark.parametrize("model_type", [t for t in MASKED if t not in ("opt",)])
@torch.no_grad()
def test_packed_position_ids_equal_sdpa(model_type):
    """Position ids that restart make sequences; learned-position OPT has no such input."""
    dense, ours = pair(model_type)
    ids = tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(6), torch.arange(1)])[None]
    options = {"position_ids": positions, "use_cache": False}
    assert_close(ours(ids, **options).logits, dense(ids, **options).logits)


@pytest.mark.parametrize("model_type", MAIN)
@torch.no_grad()
def test_cu_seq_lens_make_sequences(model_type):
    """As the flattening collator passes them, with and without the position ids that say the same."""
    dense, ours = pair(model_type)
    ids = tokens(1, 12)
    lengths = [5, 6, 1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 5, 11, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    want = torch.cat([dense(part).logits for part in ids.split(lengths, 1)], 1)
    if model_type != "opt":
        assert_close(ours(ids, position_ids=positions, use_cache=False, **packed).logits, want)
        # With a cache transformers drops packing from its masks; cu_seq_lens still say it.
        assert_close(ours(ids, position_ids=positions, use_cache=True, **packed).logits, want)
    if model_type in ("llama", "mistral"):
        # Rotary positions are relative, so they need not restart.
        assert_close(ours(ids, **packed).logits, want)


@torch.no_grad()
def test_cu_seq_lens_and_window():
    dense, ours = pair("mistral", sliding_window=4)
    ids = tokens(1, 17)
    cu = torch.tensor([0, 9, 17], dtype=torch.int32)
    want = torch.cat([dense(part).logits for part in ids.split([9, 8], 1)], 1)
    assert_close(ours(ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits, want)


@pytest.mark.parametrize("model_type", MAIN)
@torch.no_grad()
def test_chunked_prefill_and_dynamic_decode(model_type):
    dense, ours = pair(model_type)
    ids = tokens(2, 14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    for padding in (None, mask):
        want = dense(ids, attention_mask=padding).logits
        cache, got = DynamicCache(config=ours.config), []
        for start, end in ((0, 6), (6, 11), (11, 12), (12, 13), (13, 14)):
            part = None if padding is None else padding[:, :end]
            got.append(ours(ids[:, start:end], attention_mask=part, **cache_argument(ours, cache)).logits)
        assert_close(torch.cat(got, 1), want, mask.bool())


@pytest.mark.parametrize("model_type", [*MAIN, "cohere2", "olmo3", "qwen2_moe"])
@torch.no_grad()
def test_static_cache(model_type):
    """The cache holds more slots than tokens; the unfilled ones are in the future of every query."""
    dense, ours = pair(model_type)
    ids = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    for padding in (None, mask):
        want = dense(ids, attention_mask=padding).logits
        cache, got = StaticCache(config=ours.config, max_cache_len=16), []
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            part = None if padding is None else padding[:, :end]
            got.append(ours(ids[:, start:end], attention_mask=part, **cache_argument(ours, cache)).logits)
        assert_close(torch.cat(got, 1), want, mask.bool())


GENERATE = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("how", list(GENERATE))
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_generate_equals_sdpa(model_type, how):
    dense, ours = pair(model_type)
    ids = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **GENERATE[how]}
    want, got = dense.generate(ids, **options), ours.generate(ids, **options)
    assert torch.equal(got, want)
    assert called(ours) > 0


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mistral"])
def test_generate_other_families(model_type):
    dense, ours = pair(model_type)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(ours.generate(tokens(2, 7), **options), dense.generate(tokens(2, 7), **options))


@pytest.mark.parametrize("length", [3, 4, 5, 11])
@torch.no_grad()
def test_sliding_window_layers_stay_dense(length):
    """Also when the text is shorter than the window, and the mask therefore says nothing."""
    dense, ours = pair("mistral", sliding_window=4)
    assert_close(ours(tokens(2, length)).logits, dense(tokens(2, length)).logits)
    assert dense_reasons(ours) == {"sliding window 4 of the model": 2}


@torch.no_grad()
def test_window_is_read_from_mask_when_no_argument_names_it():
    """Qwen2-MoE does not pass sliding_window to the attention function."""
    dense, ours = pair("qwen2_moe")
    ours(tokens(1, 9))
    layers = hf_attn.stats(ours)["layers"]
    assert layers[0]["dense_reasons"] == {"sliding window 4 of the model": 1}
    assert layers[1]["sparse_calls"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_train_mode(reentrant):
    dense, ours = pair("llama")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for model in (dense, ours):
        model.train()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    plain = {name: p.grad.clone() for name, p in ours.named_parameters()}
    for name, parameter in dense.named_parameters():
        assert_close(plain[name], parameter.grad)
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, plain[name])


@torch.no_grad()
def test_bfloat16():
    dense, ours = pair("llama")
    ids = tokens(2, 9)
    exact = dense(ids).logits
    dense, ours = dense.bfloat16(), ours.bfloat16()
    allowed = 2 * (dense(ids).logits.float() - exact).abs().max()
    got = ours(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).abs().max() <= allowed


@torch.no_grad()
def test_right_padded_rows_give_zero():
    """Nothing of a padded row reaches the mechanism: its attention output is 0, its keys are invisible."""
    ours = build("llama", "hf_attn_exact", num_hidden_layers=1)
    outputs = []
    hook = ours.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 5:] = 0
    ours(tokens(1, 8), attention_mask=mask)
    hook.remove()
    assert outputs[0][0, 5:].abs().max() == 0 and outputs[0][0, :5].abs().min() > 0


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@torch.no_grad()
def test_bidirectional_decoder(model_type):
    """config.is_causal=False turns a decoder into an encoder; the mechanism sees causal=False."""
    window = {"sliding_window": 3} if model_type == "mistral" else {}
    dense, ours = pair(model_type, is_causal=False, **window)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for padding in (None, mask):
        options = {"attention_mask": padding, "use_cache": False}
        assert_close(ours(ids, **options).logits, dense(ids, **options).logits, mask.bool())


@torch.no_grad()
def test_types_outside_the_list_run_dense_where_a_mask_is_needed():
    """Unpadded they are plain causal and get the mechanism; a padded batch is dense, exact and counted."""
    dense, ours = pair("apertus")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert_close(ours(ids).logits, dense(ids).logits)
    assert dense_reasons(ours) == {}
    mask[0, :3] = 0
    assert_close(ours(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits, mask.bool())
    assert dense_reasons(ours) == {"dense mask of model type 'apertus'": 2}
