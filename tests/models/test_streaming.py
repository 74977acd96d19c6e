"""Conversion of a checkpoint on disk: the model of `hf_attn.convert`, little memory, resumed, nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli.app import app
from hf_attn.models import CONVERSIONS, safetensors_copy, streaming
from hf_attn.models.record import read_record
from hf_attn.models.streaming import INDEX, NEW, FolderConversion
from tests.integrations.transformers.tiny import tokens
from tests.models.families import HOSTS, MOBA, host

OPTIONS = [f"{name}={value}" for name, value in MOBA.items()]


def command(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "400"})


def with_options(*arguments):
    return [*arguments, *(part for option in OPTIONS for part in ("-o", option))]


@pytest.fixture
def base(tmp_path):
    """A Llama in several shards, with a tokenizer's file beside it."""
    host("llama").save_pretrained(tmp_path / "base", max_shard_size="20kB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= 3
    return tmp_path / "base"


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_the_same_model_as_in_memory(model_type, tmp_path):
    source = host(model_type)
    source.save_pretrained(tmp_path / "base", max_shard_size="20kB" if model_type != "qwen2" else "5GB")
    result = command(*with_options(tmp_path / "base", "moba", "--out", tmp_path / "out"))
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = hf_attn.convert(source, "moba", **MOBA)
    assert type(model) is type(want) and torch.equal(model(tokens(2, 19)).logits, want(tokens(2, 19)).logits)
    assert read_record(model.config) == read_record(want.config)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in want.state_dict().items())
    assert not (tmp_path / "out.partial").exists()


@torch.no_grad()
def test_files(base, tmp_path):
    assert command(*with_options(base, "moba", "--out", tmp_path / "out")).exit_code == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "modeling_hf_attn.py", "tokenizer.json", "generation_config.json", INDEX, NEW} <= names
    assert sorted(load_file(tmp_path / "out" / NEW)) == [f"model.layers.{i}.self_attn.k_conv1d.weight" for i in (0, 1)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MobaLlamaForCausalLM"] and config["dtype"] == "float32"
    # The shards are the base's, byte for byte of their data.
    for file in base.glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_tied_weights_and_dtype(tmp_path):
    host("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    assert command(tmp_path / "base", "moba", "--out", tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_dry_run(base, tmp_path):
    result = command(base, "moba", "--dry-run", "-o", 'layers={"-1": null}', "-o", "kconv_width=5")
    assert result.exit_code == 0 and "LlamaForCausalLM -> MobaLlamaForCausalLM" in result.output
    assert "new: 80 parameters" in result.output and "layers without new weights: 1 of 2: 1 (" in result.output
    assert not list(tmp_path.glob("*.partial"))
    row = json.loads(command(base, "moba", "--dry-run", "--json").output)
    assert row["parameters"] == host("llama").num_parameters() and row["new_parameters"] == 2 * 16 * 3
    assert row["new_weights"] == ["model.layers.*.self_attn.k_conv1d.weight"] and row["shards"] >= 3


KILLED = """
import os, signal, sys
from hf_attn.models import streaming, safetensors_copy
from hf_attn.models.streaming import FolderConversion
write, count = safetensors_copy._copy_bytes, 0
def copy_bytes(source, target, size):
    global count
    count += 1
    if count == {after}:
        target.write(b"half")
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(source, target, size)
safetensors_copy._copy_bytes = copy_bytes
FolderConversion({base!r}, "moba").run({out!r})
"""


def test_resumes_after_a_kill_in_the_middle_of_a_shard(base, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    code = KILLED.format(after=12, base=str(base), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not out.exists() and list(partial.glob("*.safetensors.partial"))
    complete = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert complete
    # Other options, or another base: not gone on with, nothing touched.
    with pytest.raises(ValueError, match="half-written conversion of another base or with other options"):
        FolderConversion(base, "moba", kconv_width=5).run(out)
    written = []
    real = streaming.copy_tensors
    monkeypatch.setattr(
        streaming, "copy_tensors", lambda source, target, *more: (written.append(target), real(source, target, *more))
    )
    FolderConversion(base, "moba").run(out)
    assert not set(written) & set(complete) and len(written) + len(complete) == len(list(base.glob("*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(out)
    want = host("llama").state_dict()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in want.items())
    assert not list(out.glob("*.partial")) and not partial.exists()


PEAK = """
import resource, sys, torch
import hf_attn
from hf_attn.models.streaming import FolderConversion
import hf_attn.models.moba.modeling_moba
def memory():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
conversion = FolderConversion({base!r}, "moba"{options})
before = memory()
conversion.run({out!r})
print(memory() - before)
"""


@pytest.mark.parametrize("options", ["", pytest.param(", dtype=torch.bfloat16", marks=pytest.mark.slow)])
def test_memory_stays_below_one_copy(tmp_path, options):
    """A model of 96 MiB of random weights in two shards: copying needs a buffer, a change of dtype one tensor."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4096, "head_dim": 64}
    config = AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=8, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    size = model.num_parameters() * 4 / 2**20
    model.save_pretrained(tmp_path / "base", max_shard_size="64MB")
    del model
    code = PEAK.format(base=str(tmp_path / "base"), out=str(tmp_path / "out"), options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Pages of the mapped source count too once they were read, so a change of dtype may touch the model once.
    limit = 48 if not options else size + 32
    assert size > 90 and float(done.stdout.split()[-1]) < limit, (done.stdout, size)


@torch.no_grad()
def test_systems_that_rewrite_or_look_at_the_base(base, tmp_path, monkeypatch):
    from tests.models import other_kinds

    monkeypatch.setitem(CONVERSIONS, "extra", "tests.models.other_kinds")
    FolderConversion(base, "extra", look=True).run(tmp_path / "looked")
    weight = load_file(tmp_path / "looked" / NEW)["extra.weight"]
    want = hf_attn.convert(host("llama"), "extra", look=True)
    assert torch.equal(weight, want.extra.weight)
    monkeypatch.setattr(other_kinds, "CONVERSION", other_kinds.REWRITING)
    FolderConversion(base, "extra").run(tmp_path / "out")
    found = {name: w for file in (tmp_path / "out").glob("*.safetensors") for name, w in load_file(file).items()}
    for name, weight in host("llama").state_dict().items():
        assert torch.equal(found[name], 2 * weight if "embed_tokens" in name else weight)


class TestBadInput:
    def refused(self, *arguments, message):
        result = command(*arguments)
        assert result.exit_code == 2 and message in result.output, result.output
        assert len(result.output.strip().splitlines()) == 1

    def test_output(self, base, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")
        self.refused(base, "moba", "--out", tmp_path / "out", message="never overwritten")
        assert (tmp_path / "out" / "mine").read_text() == "keep"
        (tmp_path / "new.partial").mkdir()
        (tmp_path / "new.partial" / "mine").write_text("keep")
        result = command(base, "moba", "--out", tmp_path / "new")
        assert result.exit_code == 2 and "half-written conversion" in result.output
        assert (tmp_path / "new.partial" / "mine").read_text() == "keep"
        self.refused(base, "moba", message="--out is missing")

    def test_names_and_options(self, base, tmp_path):
        self.refused(base, "mobaa", "--out", tmp_path / "out", message="did you mean 'moba'?")
        self.refused(base, "moba", "--out", tmp_path / "out", "-o", "top_k=0", message="top_k must be an integer >= 1")
        self.refused(base, "moba", "--dry-run", "--dtype", "int8", message="--dtype must be one of")
        self.refused("/no/such", "moba", "--dry-run", message="no such folder: /no/such")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    def test_architectures(self, tmp_path):
        host("gpt2").save_pretrained(tmp_path)
        self.refused(tmp_path, "moba", "--dry-run", message="no class for model type 'gpt2'")
        host("llama").model.save_pretrained(tmp_path / "body")
        self.refused(tmp_path / "body", "moba", "--dry-run", message="takes a causal language model (LlamaForCausalLM)")

    def test_gguf_and_pickle(self, base, tmp_path):
        self.refused(tmp_path / "model.gguf", "moba", "--dry-run", message="is a GGUF file")
        for file in base.glob("*.safetensors*"):
            file.unlink()
        (base / "model.gguf").write_bytes(b"GGUF")
        self.refused(base, "moba", "--dry-run", message="holds only model.gguf: hf-attn converts safetensors")
        (base / "model.gguf").rename(base / "pytorch_model.bin")
        self.refused(base, "moba", "--dry-run", message="holds only pytorch_model.bin")

    def test_quantised(self, base):
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (base / "config.json").write_text(json.dumps(config))
        self.refused(base, "moba", "--dry-run", message="is quantised (bitsandbytes)")

    def test_incomplete(self, base):
        files = sorted(base.glob("*.safetensors"))
        data = files[0].read_bytes()
        files[0].write_bytes(data[:-10])
        self.refused(base, "moba", "--dry-run", message=f"{files[0]} is cut off")
        tensors = load_file(files[1])
        files[0].write_bytes(data)
        lost = next(iter(tensors))
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, files[1])
        self.refused(base, "moba", "--dry-run", message=f"({lost}, ...): is the checkpoint complete")
        save_file({**tensors, lost: torch.zeros(3)}, files[1])
        self.refused(base, "moba", "--dry-run", message=f"{lost} has shape [3]")
        files[1].unlink()
        self.refused(base, "moba", "--dry-run", message=f"lacks {files[1].name}, which its index names")


def test_an_incomplete_folder_is_refused_in_memory_too(base):
    """transformers would draw the missing weights at random."""
    file = sorted(base.glob("*.safetensors"))[1]
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of a LlamaForCausalLM"):
        hf_attn.convert(base, "moba")


def test_headers_of_files_without_tensors(tmp_path):
    safetensors_copy.write_tensors(tmp_path / "empty.safetensors", {})
    assert safetensors_copy.read_header(tmp_path / "empty.safetensors")[0] == {}
    assert os.listdir(tmp_path) == ["empty.safetensors"]
