"""The server of transformers with a checkpoint that names its mechanism, started as docs/transformers.md says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils.import_utils import is_serve_available

import hf_attn
from hf_attn.integrations.transformers.serve import follow_checkpoint
from tests.integrations.transformers.modes import MECHANISMS, SPARSE, sparse

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "attention is read in blocks"
needs_server = pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]' is not there")


def ask(port: int, model: str) -> str:
    """The completion of PROMPT by a server on this machine."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0.0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())["choices"][0]["text"]


def serve(model: str, start: list[str], *options: str) -> str:
    """Start a server, ask it once, end it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, *start, model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_ATTN_BACKEND": "torch", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
    )
    try:
        for _ in range(240):
            try:
                return ask(port, model)
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                assert server.poll() is None, server.stderr.read()[-3000:]
                time.sleep(0.25)
        pytest.fail("the server never answered")
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def completion(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """By mechanism: a folder whose config selects it, and the completion it must give."""

    def make(name: str) -> tuple[str, str]:
        folder = str(tmp_path_factory.mktemp(name))
        tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.4)
        dense = completion(model, tokenizer)
        hf_attn.apply(model, name, **SPARSE[name])
        ours = completion(model, tokenizer)
        assert ours != dense
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, ours

    return make


OURS = ["-m", "hf_attn.integrations.transformers.serve"]


@needs_server
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_checkpoint_chooses(name, checkpoint, sparse_path):
    folder, want = checkpoint(name)
    assert serve(folder, OURS) == want


@needs_server
@pytest.mark.parametrize("name", MECHANISMS)
def test_continuous_batching(name, checkpoint, sparse_path):
    folder, want = checkpoint(name)
    sizes = ["--cb-num-blocks", "32", "--cb-max-batch-tokens", "64"]
    assert serve(folder, OURS, "--continuous-batching", *sizes) == want


@needs_server
@pytest.mark.slow
def test_the_plain_command_is_dense(checkpoint, sparse_path):
    """What the page warns of; when this fails, `python -m hf_attn.integrations.transformers.serve` is not needed."""
    folder, ours = checkpoint("streaming")
    start = "import hf_attn; from transformers.cli.transformers import app; app()"
    assert serve(folder, ["-c", start, "serve"]) != ours


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_dropped_choice_is_taken_up(name, tmp_path):
    """The loader's `attn_implementation=None` discards the checkpoint's choice; doctor sees it, the server repairs."""
    sparse(name).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=None)
    assert model.config._attn_implementation == "sdpa"
    assert f"config.hf_attn names '{name}', but the model runs 'sdpa'" in str(hf_attn.doctor(model))
    assert hf_attn.doctor(follow_checkpoint(model)).ok
    assert hf_attn.stats(model)["options"]["block_size"] == SPARSE[name]["block_size"]
