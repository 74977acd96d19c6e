"""What cannot be honoured raises, and says what, the value, what is allowed and the next step."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, T5Config, T5ForConditionalGeneration

import hf_attn
from hf_attn.integrations.transformers.attention import REFUSED, attention_forward
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


def test_cross_attention():
    model = build("gpt2", "hf_attn_exact", add_cross_attention=True)
    with pytest.raises(ValueError, match="GPT2Attention.* does not support cross-attention"):
        model(tokens(1, 5), encoder_hidden_states=torch.zeros(1, 3, 32))


def test_encoder_decoder():
    config = T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="hf_attn_exact")
    with pytest.raises(ValueError, match="T5Attention.* does not support cross-attention and encoder-decoder models"):
        model(tokens(1, 5), decoder_input_ids=tokens(1, 2))
