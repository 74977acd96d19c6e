"""The recipe lserve_gates: its mathematics, a whole run in seconds, and a killed run that ends with the same gates."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_attn
from hf_attn.analysis.head_files import load_heads, save_duo_heads
from hf_attn.analysis.texts import python_reference_text
from hf_attn.training.head_gates import GateTrainer, TwoWayAttention, distillation_loss, gate_schedule
from hf_attn.training.passkeys import RADIO_ALPHABET, PasskeyText
from tests.integrations.transformers.tiny import build, tokens

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "recipes" / "lserve_gates" / "train.py"
SINK, LOCAL = 3, 6


@pytest.fixture
def two_way():
    """A tiny model in float64 with two-way attention, gates of 0.7, and a batch of ids."""
    model = build("llama").double().requires_grad_(False)
    attention = TwoWayAttention(torch.full((2, 2), 0.7, dtype=torch.float64), SINK, LOCAL)
    hf_attn.register_mechanism(attention.mechanism("two_way"))
    hf_attn.apply(model, "two_way")
    yield model, attention, tokens(2, 30)
    hf_attn.unregister_mechanism("two_way")


def hidden(model, attention, ids, mode: str, gates=None) -> torch.Tensor:
    with attention.mode(mode, gates):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def test_student_between_dense_and_streaming(two_way):
    """Gates of 1 give the teacher; gates of 0, and classes without retrieval heads, give LServe all streaming."""
    model, attention, ids = two_way
    with torch.no_grad():
        teacher = hidden(model, attention, ids, "teacher")
        ones, zeros = torch.ones(2, 2).double(), torch.zeros(2, 2).double()
        torch.testing.assert_close(hidden(model, attention, ids, "student", ones), teacher)
        torch.testing.assert_close(hidden(model, attention, ids, "deployed", ones), teacher)
        streaming = hidden(model, attention, ids, "student", zeros)
        torch.testing.assert_close(hidden(model, attention, ids, "deployed", zeros), streaming)
        mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        deployed = hidden(model, attention, ids, "deployed", mixed)
        hf_attn.apply(model, "lserve", heads=mixed.int().tolist(), ctx_sink=SINK, ctx_local=LOCAL)
        torch.testing.assert_close(model.base_model(ids, use_cache=False).last_hidden_state, deployed)
    assert (streaming - teacher).abs().max() > 1e-2


def test_gradient_of_the_gates(two_way):
    """Against central differences, in float64; the frozen weights get none."""
    model, attention, ids = two_way
    labelled = torch.zeros(2, 30, dtype=torch.bool)
    labelled[:, -9:] = True
    gates = attention.gates = nn.Parameter(attention.gates)
    teacher = hidden(model, attention, ids, "teacher").detach()

    def loss() -> torch.Tensor:
        student = hidden(model, attention, ids, "student")
        return (teacher[labelled] - student[labelled]).square().mean()

    (gradient,) = torch.autograd.grad(loss(), gates)
    step = 1e-3  # the norms of the model compute in fp32, so a smaller one would measure rounding
    with torch.no_grad():
        for place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            values = []
            for sign in (1, -1):
                gates[place] += sign * step
                values.append(float(loss()))
                gates[place] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            assert abs(float(gradient[place]) - expected) < 2e-3 * abs(expected), (place, gradient, expected)
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(
        distillation_loss(teacher, teacher + 2, labelled), torch.tensor(4.0), rtol=1e-5, atol=1e-5
    )


def test_checkpointing_gives_the_same_steps(two_way):
    """Recomputed layers read the same teacher output; three steps end in the same gates."""
    model, attention, ids = two_way
    ended = []
    for checkpointing in (False, True):
        attention.gates = torch.full((2, 2), 0.7)
        model.float()
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = GateTrainer(model.base_model, attention, steps=3)
        for _ in range(3):
            trainer.step(ids, torch.ones_like(ids, dtype=torch.bool))
        ended.append(trainer.final_gates)
    torch.testing.assert_close(*ended)
    assert (ended[0] != 0.7).all()


def test_gates_stay_in_range_and_unused_ones_only_shrink(two_way):
    """Short rows, where streaming is dense: only the penalty is left, and the gates end at 0, not below."""
    model, attention, _ = two_way
    model.float()
    trainer = GateTrainer(model.base_model, attention, steps=60, learning_rate=0.05)
    ids = tokens(1, SINK + LOCAL)
    for _ in range(60):
        figures = trainer.step(ids, torch.ones_like(ids, dtype=torch.bool))
    assert figures["distillation"] < 1e-9 and torch.equal(trainer.final_gates, torch.zeros(2, 2))


def test_padding_is_refused(two_way):
    model, attention, ids = two_way
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match="whole rows of equal length"), torch.no_grad():
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="mode must be one of 'teacher', 'student', 'deployed', got 'x'"):
        with attention.mode("x"):
            pass


def test_schedule():
    assert [round(gate_schedule(i, 10), 3) for i in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]
    assert gate_schedule(0, 2000) == 0.1 == gate_schedule(1999, 2000)
    assert gate_schedule(199, 2000) == 0.5 and gate_schedule(1000, 2000) == 1


def test_rows_of_passkeys(tiny_model):
    """Exact length, keys in order inside the text at their depths, every word asked for again at the end."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    filler = torch.tensor(tokenizer(python_reference_text()[:9000])["input_ids"])
    data = PasskeyText(tokenizer, filler, keys=3, words=2)
    ids, labelled = data.row(1500, torch.Generator().manual_seed(5))
    again, _ = data.row(1500, torch.Generator().manual_seed(5))
    other, _ = data.row(1500, torch.Generator().manual_seed(6))
    assert torch.equal(ids, again) and not torch.equal(ids, other) and ids.shape == labelled.shape == (1500,)
    text, tail = tokenizer.decode(ids[~labelled]), tokenizer.decode(ids[labelled])
    assert "Question" in tail and "Question" not in text
    last = 0
    for number in (1, 2, 3):
        key = tail.split(f"number {number} is ")[1].split(".")[0]
        assert len(key.split()) == 2 and set(key.split()) <= set(RADIO_ALPHABET)
        place = text.index(f"passkey number {number}: {key}.")
        assert 0.04 * len(text) < place < 0.96 * len(text) and place > last
        last = place
    with pytest.raises(ValueError, match="has no room for text beside 3 passkeys of 2 words"):
        data.row(200, torch.Generator())
    with pytest.raises(ValueError, match="the filler has 90"):
        data.row(20000, torch.Generator())
    with pytest.raises(ValueError, match="depths must be two shares"):
        PasskeyText(tokenizer, filler, depths=(0.9, 0.1))


# -- the script --------------------------------------------------------------------------------------------------------


def arguments(model: str, output: Path, *options: str) -> list[str]:
    sizes = ["context_min=512", "context_max=640"]
    return ["--smoke", "--output", str(output), f"model={model}", *sizes, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def train(monkeypatch):
    """The script's `main` in this process, on one thread as in a process of its own."""
    module = runpy.run_path(str(TRAIN), run_name="lserve_gates")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*given: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *given])
        module["main"]()

    yield run
    torch.set_num_threads(threads)


def test_smoke_and_resume_after_kill(tiny_model, tmp_path, train, capsys):
    """A run killed after step 3 and started again ends with bit for bit the gates of one that was left alone."""
    script = [sys.executable, str(TRAIN), *arguments(tiny_model, tmp_path / "killed")]
    killed = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment())
    for line in killed.stdout:
        if line.startswith("step 3/"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    killed.stdout.close()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "heads").exists()

    train(*arguments(tiny_model, tmp_path / "whole"))
    assert "step 1/6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made with other settings"):
        train(*arguments(tiny_model, tmp_path / "killed", "learning_rate=0.1"))
    hf_attn.unregister_mechanism("gate_training")
    train(*arguments(tiny_model, tmp_path / "killed"))
    printed = capsys.readouterr().out
    assert "going on after step" in printed and "step 1/6" not in printed and "step 6/6" in printed
    expected, got = load_heads(tmp_path / "whole" / "heads"), load_heads(tmp_path / "killed" / "heads")
    assert torch.equal(got.gates, expected.gates) and (got.gates < 1).any() and got.method == "gates"
    comparison = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    assert comparison.keys() == {"trained", "calibrated", "random mean", "random lowest"}
    with pytest.raises(SystemExit, match="the run is finished"):
        train(*arguments(tiny_model, tmp_path / "whole"))

    # The folder goes onto the base model; its gates survive DuoAttention's format.
    config = AutoConfig.from_pretrained(tmp_path / "whole" / "heads")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, config=config)
    assert model.config._attn_implementation == "hf_attn_lserve"
    save_duo_heads(tmp_path / "duo", got)
    assert torch.equal(hf_attn.load_duo_heads(tmp_path / "duo").alpha, got.gates)


def test_smoke_needs_no_download(tmp_path, train, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("hf_attn.bench.models.bundled_smollm2", lambda: None)
    train("--smoke", "--output", str(tmp_path), "steps=2")
    assert load_heads(tmp_path / "heads").gates.shape == (2, 2)


def test_wrong_options_end_in_one_line(tiny_model, tmp_path, train):
    with pytest.raises(SystemExit, match="unknown or missing options: stepz"):
        train(*arguments(tiny_model, tmp_path, "stepz=3"))
    with pytest.raises(SystemExit, match="options are NAME=VALUE, got 'steps'"):
        train(*arguments(tiny_model, tmp_path, "steps"))


def test_every_option_is_explained():
    """Each line of the YAML that sets something stands under a comment."""
    lines = (TRAIN.parent / "config.yaml").read_text().splitlines()
    names = [line.split(":")[0] for line in lines if line and not line.startswith("#")]
    assert sorted(names) == sorted(yaml.safe_load("\n".join(lines)))
    blocks = "\n".join(lines[1:]).strip().split("\n\n")
    for block in blocks:
        comments = sum(line.startswith("#") for line in block.splitlines())
        assert comments >= 1, block


@pytest.mark.slow
def test_two_processes_sharded_or_not(tiny_model, tmp_path, train):
    """Two gloo processes: gates are averaged, and sharding the frozen weights changes nothing."""
    gates = []
    # `accelerate launch --cpu` starts one process only unless there is MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAIN)]
    for shard in ("false", "true"):
        script = arguments(tiny_model, tmp_path / shard, f"shard={shard}", "eval_rows=0")
        cpu = {**environment(), "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run([*launch, *script], capture_output=True, text=True, env=cpu)
        assert done.returncode == 0, done.stderr
        gates.append(load_heads(tmp_path / shard / "heads").gates)
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-4)
    train(*arguments(tiny_model, tmp_path / "alone", "eval_rows=0"))
    assert not torch.equal(load_heads(tmp_path / "alone" / "heads").gates, gates[0])
    with pytest.raises(SystemExit, match="needs several processes"):
        train(*arguments(tiny_model, tmp_path / "one", "shard=true"))
    hf_attn.unregister_mechanism("gate_training")
