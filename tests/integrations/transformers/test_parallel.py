"""Several processes and several devices: tensor parallelism, an FSDP2 step (2 gloo processes), disk offload."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_attn
from tests.integrations.transformers.modes import MECHANISMS, SPARSE, all_sparse, sparse
from tests.integrations.transformers.tiny import assert_close, build, tokens

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, float]]:
    """What both processes measured; one launch for all tests."""
    pytest.importorskip("accelerate", reason="transformers loads a tensor-parallel model with it")
    folder = tmp_path_factory.mktemp("model")
    # An even vocabulary: older versions split the head into equal parts only.
    build("llama", vocab_size=98).save_pretrained(folder)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integrations.transformers.parallel_worker", str(folder)]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert workers[0].returncode == 0, outputs[0][1][-3000:]
    line = next(line for line in outputs[0][0].splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.parametrize("name", MECHANISMS)
def test_tensor_parallel(name, results):
    """Half of the heads a process, counted from the tensors; outputs as in one process."""
    found = results[f"tensor {name}"]
    assert found["heads"] == 2 and found["logits"] < 2e-5 and not found["tokens differ"]


@pytest.mark.parametrize("name", MECHANISMS)
def test_fsdp2_training_step(name, results):
    found = results[f"fsdp {name}"]
    assert found["loss"] < 1e-5 and found["grad"] < 1e-5


@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_disk_offload(name, tmp_path, sparse_path):
    """Half of the layers on disk; accelerate's hooks bring them in for each call."""
    pytest.importorskip("accelerate")
    want = sparse(name, "llama")
    want.save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places = {**parts, "model.layers.0": "cpu", "model.layers.1": "disk"}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert ours.config.hf_attn == {"mechanism": name, **SPARSE[name]}
    assert ours.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :4] = 0
    got = ours(tokens(2, 23), attention_mask=mask).logits
    assert_close(got, want(tokens(2, 23), attention_mask=mask).logits, mask.bool())
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(ours.generate(tokens(2, 23), **options), want.generate(tokens(2, 23), **options))
    assert all_sparse(ours) and hf_attn.doctor(ours).ok
