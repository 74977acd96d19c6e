"""What cannot be honoured raises, and says what, the value, what is allowed and the next step."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_attn
from hf_attn.integrations.transformers.attention import CROSS_ATTENTION, REFUSED, attention_forward
from tests.integrations.transformers.tiny import SIZES, assert_close, build, pair, tokens


def test_soft_capping():
    model = build("gemma2", "hf_attn_exact", attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match=r"hf_attn_exact \(Gemma2Attention\) does not support soft-capping .* 50\.0"):
        model(tokens(1, 5))


def test_attention_sinks():
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = GptOssForCausalLM._from_config(config, attn_implementation="hf_attn_exact")
    with pytest.raises(ValueError, match=r"attention sinks \(s_aux\), got a tensor \(4,\).*'eager'"):
        model(tokens(1, 5))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dropout_in_train_mode(model_type):
    rate = {"attention_dropout": 0.1} if model_type == "llama" else {"attn_pdrop": 0.1}
    model = build(model_type, "hf_attn_exact", **rate)
    model(tokens(1, 5))
    with pytest.raises(ValueError, match=r"has no attention dropout, got dropout=0\.1; only 0.*attention_dropout=0"):
        model.train()(tokens(1, 5))


@pytest.mark.parametrize("argument", [*REFUSED, "output_attentions"])
def test_arguments_of_the_host(argument):
    """Straight at the function: every argument that changes the result in a way no mechanism can honour."""
    module = build("llama", "hf_attn_exact").model.layers[0].self_attn
    heads = torch.zeros(1, 4, 3, 8)
    value = True if argument == "output_attentions" else torch.zeros(4)
    with pytest.raises(ValueError, match=argument):
        attention_forward(module, heads, heads, heads, None, hf_attn_name="exact", **{argument: value})
    attention_forward(module, heads, heads, heads, None, hf_attn_name="exact", **{argument: None})


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_arbitrary_masks_of_the_user(kind):
    model = build("llama", "hf_attn_exact")
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    if kind == "float":
        mask = torch.zeros(1, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match=r"hf_attn_exact cannot follow an arbitrary mask, got a 4-D attention_mask"):
        model(tokens(1, 5), attention_mask=mask)


@torch.no_grad()
def test_arbitrary_masks_are_followed_by_layers_that_stay_dense():
    dense, ours = pair("llama")
    hf_attn.apply(ours, "exact", layers={":": None})
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    mask[..., 3, 1] = False
    assert_close(ours(tokens(1, 5), attention_mask=mask).logits, dense(tokens(1, 5), attention_mask=mask).logits)


def test_output_attentions_on_the_config():
    model = build("llama", "hf_attn_exact")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_non_causal_modules_are_left_to_the_mechanism():
    """The seam hands causal=False over; a causal-only mechanism refuses by itself."""
    model = build("llama", is_causal=False)
    hf_attn.apply(model, "streaming", window=4, block_size=2)
    with pytest.raises(ValueError, match="streaming needs causal attention"):
        model(tokens(1, 9), use_cache=False)


@pytest.mark.parametrize("length", [3, 5])
@torch.no_grad()
def test_cross_attention_is_dense_and_counted(length):
    """Also when there are as many encoder tokens as queries: their padding is not the queries' padding."""
    dense, ours = pair("gpt2", add_cross_attention=True)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, -1] = 0
    encoder = {"encoder_hidden_states": torch.randn(1, length, 32), "encoder_attention_mask": mask}
    assert_close(ours(tokens(1, 5), **encoder).logits, dense(tokens(1, 5), **encoder).logits)
    totals = hf_attn.stats(ours)["totals"]
    assert totals["dense_reasons"] == {CROSS_ATTENTION: 2} and totals["sparse_calls"] == 2


def test_position_bias():
    """T5 adds one to its scores: refused when called, and before that by apply."""
    config = T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="hf_attn_exact")
    with pytest.raises(ValueError, match=r"\(T5Attention\) does not support an additive position bias"):
        model(tokens(1, 5), decoder_input_ids=tokens(1, 2))
    with pytest.raises(ValueError, match="hf_attn_moba does not support an additive position bias"):
        hf_attn.apply(model, "moba")


def test_what_apply_refuses_before_anything_runs():
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    with pytest.raises(ValueError, match=r"hf_attn_moba does not support attention sinks \(s_aux\), which GptOss"):
        hf_attn.apply(GptOssForCausalLM._from_config(config, attn_implementation="eager"), "moba")
    sizes = {"vocab_size": 97, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    model = BartForConditionalGeneration(BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2))
    with pytest.raises(ValueError, match="hf_attn_streaming needs causal attention, but the encoder of Bart"):
        hf_attn.apply(model, "streaming")
    hf_attn.apply(model, "moba")


def test_packed_rows_beside_an_encoder():
    """One cu_seq_lens would be read by encoder, decoder and cross-attention, whose tokens are not the same."""
    module = build("gpt2", "hf_attn_exact", add_cross_attention=True).transformer.h[0].crossattention
    heads, packed = torch.zeros(1, 4, 5, 8), {"cu_seq_lens_q": torch.tensor([0, 2, 5])}
    with pytest.raises(ValueError, match=r"does not support packed rows .* with cross-attention; pass one sequence"):
        attention_forward(module, heads, heads, heads, None, hf_attn_name="exact", **packed)


@pytest.mark.parametrize("name", ["vmoba", "paroattention"])
def test_mechanisms_of_video_models_are_refused_at_once(name):
    model = build("llama")
    with pytest.raises(ValueError, match="latent grid of diffusion transformers"):
        hf_attn.apply(model, name)
    assert model.config.hf_attn is None and model.config._attn_implementation == "sdpa"
