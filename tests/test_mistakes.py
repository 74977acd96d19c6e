"""Mistakes that users make, each with the one message it must end in: what was given, what is allowed, what to do."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

import hf_attn
from hf_attn import checks, ops
from hf_attn.cli.app import app
from hf_attn.pattern import BlockPattern
from tests.integrations.diffusers.tiny import build as pipeline
from tests.integrations.transformers.tiny import build, tokens


def wrong_name(_):
    hf_attn.apply(build("llama"), "mobba")


def wrong_option(_):
    hf_attn.apply(build("llama"), "moba", topk=4)


def too_small_top_k(_):
    hf_attn.apply(build("llama"), "moba", top_k=0)


def layer_that_is_not_there(_):
    hf_attn.apply(build("llama"), "moba", layers={40: None})


def model_without_interface(_):
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    hf_attn.apply(BloomForCausalLM(config), "moba")


def padded_batch_with_a_mask_of_pairs(_):
    model = hf_attn.apply(build("llama"), "moba", block_size=4, top_k=1, min_seq_len=0)
    mask = torch.rand(1, 1, 20, 20).tril() > 0.3
    model(tokens(1, 20), attention_mask=mask)


def attention_weights(_):
    hf_attn.apply(build("llama"), "moba")(tokens(1, 8), output_attentions=True)


def video_mechanism_on_text(_):
    hf_attn.apply(build("llama"), "vmoba")


def text_mechanism_on_video(_):
    hf_attn.apply(pipeline("wan").target, "moba")


def repair_of_another_model(_):
    hf_attn.apply(build("llama"), "lightning")


def a_name_instead_of_a_model(_):
    hf_attn.apply("meta-llama/Llama-3.2-1B", "moba")


def a_peft_model(_):
    lora = peft.LoraConfig(target_modules=["q_proj"])
    hf_attn.apply(peft.get_peft_model(build("llama"), lora), "moba")


def a_compiled_model(_):
    hf_attn.apply(torch.compile(build("llama")), "moba")


def convert_an_unsupported_model(_):
    hf_attn.convert(build("gemma2", "eager"), "moba")


def convert_over_an_existing_folder(folder: Path):
    (folder / "old.txt").write_text("mine")
    command = ["convert", "any/model", "moba", "--out", str(folder)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert (folder / "old.txt").read_text() == "mine" and result.exit_code != 0
    raise FileExistsError(result.output)


def adapter_without_its_file(folder: Path):
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder)
    hf_attn.load_adapter(build("llama"), folder)


def push_an_empty_folder(folder: Path):
    hf_attn.push(folder, "me/model")


def plan_from_an_empty_folder(folder: Path):
    hf_attn.load_plan(pipeline("wan").target, folder)


def triton_without_a_gpu(_):
    q = torch.randn(1, 1, 8, 8)
    ops.linear_attention(q, q, q, torch.ones(1))


def unknown_backend(_):
    q = torch.randn(1, 1, 8, 8)
    ops.linear_attention(q, q, q, torch.ones(1))


def native_without_a_build(_):
    q = torch.randn(1, 1, 8, 8)
    pattern = BlockPattern.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), block_q=4, block_k=4, q_len=8, k_len=8)
    ops.block_sparse_attention(q, q, q, pattern)


def native_for_an_op_without_it(_):
    x = torch.randn(1, 1, 4, 8)
    ops.linear_attention(x, x, x, torch.zeros(1))


def window_larger_than_the_map(_):
    x = torch.randn(1, 5, 5, 1, 8)
    ops.neighborhood_attention(x, x, x, kernel_size=7)


def assisted_decoding_with_a_state(_):
    from hf_attn.models.tnl import TnlConfig, TnlForCausalLM

    config = TnlConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = TnlForCausalLM(config)
    model.generate(tokens(1, 8), max_new_tokens=4, prompt_lookup_num_tokens=2)


def states_that_are_not_exact(_):
    from hf_attn.caches.recurrent import RecurrentState

    RecurrentState().put(1, state=torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16))


MISTAKES = {
    wrong_name: (ValueError, r"'mobba'.*did you mean 'moba'"),
    wrong_option: (ValueError, r"no option 'topk' .did you mean 'top_k'"),
    too_small_top_k: (ValueError, "top_k must be an integer >= 1, got 0"),
    layer_that_is_not_there: (ValueError, r"layers names layer 40, but the model has \d layers"),
    model_without_interface: (
        ValueError,
        "BloomForCausalLM has attention code of its own.*use a model whose attention",
    ),
    padded_batch_with_a_mask_of_pairs: (ValueError, "mask"),
    attention_weights: (ValueError, "output_attentions"),
    video_mechanism_on_text: (ValueError, "latent grid of diffusion transformers.*apply it to a diffusers pipeline"),
    text_mechanism_on_video: (ValueError, "'moba' does not support diffusers models; mechanisms that do: .*psa"),
    repair_of_another_model: (ValueError, "'lightning' repairs models of type minimax"),
    a_name_instead_of_a_model: (TypeError, "takes a transformers PreTrainedModel, a diffusers pipeline .* got str"),
    a_peft_model: (TypeError, r"for a PEFT model pass model.get_base_model\(\)"),
    a_compiled_model: (TypeError, "pass the model itself, before torch.compile"),
    convert_an_unsupported_model: (ValueError, "gemma2"),
    convert_over_an_existing_folder: (FileExistsError, "exists already and is never overwritten"),
    adapter_without_its_file: (ValueError, "has no hf_attn.json"),
    push_an_empty_folder: (ValueError, ""),
    plan_from_an_empty_folder: (ValueError, "holds no plan"),
    triton_without_a_gpu: (RuntimeError, "HF_ATTN_BACKEND=triton cannot run linear_attention: .*need a GPU.*Unset"),
    unknown_backend: (ValueError, "HF_ATTN_BACKEND='cuda' is unknown; allowed: auto, reference, torch, native, triton"),
    native_without_a_build: (RuntimeError, "HF_ATTN_BACKEND=native .*not built .hf-attn build-cpu.*'torch' or unset"),
    native_for_an_op_without_it: (RuntimeError, "native cannot run linear_attention: only block_sparse.*Unset"),
    window_larger_than_the_map: (ValueError, "kernel_size"),
    assisted_decoding_with_a_state: (ValueError, "stateful|assisted|assistant"),
    states_that_are_not_exact: (ValueError, "must be float32 or float64, got torch.bfloat16"),
}
BACKENDS = {
    triton_without_a_gpu: "triton",
    unknown_backend: "cuda",
    native_without_a_build: "native",
    native_for_an_op_without_it: "native",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__.replace("_", " "))
def test_ends_in_one_message(mistake, tmp_path, monkeypatch):
    if mistake in BACKENDS:
        monkeypatch.setenv("HF_ATTN_BACKEND", BACKENDS[mistake])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    error, message = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        mistake(tmp_path)
    text = str(raised.value)
    assert re.search(message, text, re.S), text
    assert raised.value.__cause__ is None and len(text.splitlines()) <= 3, text


def test_a_package_that_is_too_old(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.1" if name == "transformers" else real(name))
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.\d+, found 4.57.1; pip install --upgrade trans"):
        checks.require_hosts("torch", "transformers")


def test_a_checkpoint_loaded_before_the_import(tmp_path):
    """The config says what was meant, the model runs dense: `doctor` tells, and says how to mend it."""
    model = hf_attn.apply(build("llama"), "streaming", window=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    (problem,) = hf_attn.doctor(loaded).problems
    assert "config.hf_attn names 'streaming', but the model runs 'sdpa'" in problem and "hf_attn.apply" in problem
