"""The needle recipe of Titans: `--smoke` ends, losses fall, an interrupted run goes on; its data are right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from hf_attn.models.titans import TitansConfig, TitansForCausalLM
from hf_attn.training.recall import RecallRows, open_gates, recall_accuracy, silenced_memory
from tests.recipes.test_moba_recipes import RECIPES, script

pytest.importorskip("accelerate")


def smoke(output: Path, monkeypatch, *more: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--smoke", "--output", str(output), *more])
    script("titans_needle").main()


def test_smoke_and_resume(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    smoke(tmp_path, monkeypatch)
    results = {result["model"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    assert set(results) == {"memory", "full attention", "sliding window"}
    sizes = [result["parameters"] for result in results.values()]
    assert max(sizes) / min(sizes) < 1.02
    for result in results.values():
        assert result["losses"][-1][1] < result["losses"][0][1]
    assert {row["variant"] for row in results["memory"]["rows"]} == {"memory", "memory switched off"}
    assert {row["times"] for row in results["memory"]["rows"]} == {1, 4}
    assert (tmp_path / "recall.png").stat().st_size > 10000 and "| memory |" in capsys.readouterr().out
    folder = tmp_path / "memory_0"
    want = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(want) is TitansForCausalLM

    # Killed in step 13, three steps behind a checkpoint: the second start ends with the same weights; done runs stay.
    shutil.rmtree(folder)
    step, calls = Trainer.training_step, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smoke(tmp_path, monkeypatch, "--model", "memory")
    assert (folder / "checkpoints/checkpoint-10").is_dir() and not (folder / "model").exists()
    smoke(tmp_path, monkeypatch)
    assert len(calls) == 13 + 10
    got = AutoModelForCausalLM.from_pretrained(folder / "model")
    for mine, theirs in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_every_option_is_in_the_config():
    options = yaml.safe_load((RECIPES / "titans_needle/config.yaml").read_text())
    assert set(options["model"]) <= set(TitansConfig().to_dict())
    RecallRows(**options["task"])
    TitansForCausalLM(TitansConfig(vocab_size=8, **options["model"]))


def test_rows_of_recall():
    task = RecallRows(pairs=3, keys=5, values=4, filler=2)
    ids, labels = task.rows(50, 6, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (50, 18) and 0 < ids.min() and ids.max() < task.vocabulary == 12
    told, filler, asked = ids.split([6, 6, 6], 1)
    assert (filler > 9).all() and (told[:, ::2] <= 5).all() and (told[:, 1::2] > 5).all() and (told <= 9).all()
    for row in range(50):
        pairs = dict(told[row].view(3, 2).tolist())
        assert len(pairs) == 3 and pairs == dict(asked[row].view(3, 2).tolist())
    assert torch.equal(labels[:, 13::2], ids[:, 13::2]) and (labels != -100).sum() == 150
    with pytest.raises(ValueError, match="keys=2 must be at least pairs=3"):
        RecallRows(pairs=3, keys=2)


@torch.no_grad()
def test_accuracy_counts_answers():
    """A model that always says token 6 is right where the answer is 6."""
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.zero_()
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.fill_(1)
    model.lm_head.weight[6] = 1
    ids, labels = RecallRows(pairs=3, keys=5, values=4, filler=2).rows(20, 4, torch.Generator().manual_seed(0))
    asked = labels[labels != -100]
    assert recall_accuracy(model, ids, labels, batch=7) == pytest.approx(float((asked == 6).float().mean()))
    with pytest.raises(ValueError, match="no neural memory"), silenced_memory(model):
        pass


@torch.no_grad()
def test_open_gates_have_one_sign():
    """And queries and keys do not see the direction along which they opened."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = TitansForCausalLM(TitansConfig(vocab_size=50, memory_num_heads=1, initializer_range=0.125, **sizes))
    layer = model.model.layers[0]

    def positive() -> float:
        tokens = layer.mixer_norm(model.model.embed_tokens.weight)
        return float((layer.mixer.memory.g_proj(tokens) > 0).float().mean())

    assert 0.4 < positive() < 0.6
    before = layer.mixer.memory.q_proj(layer.mixer_norm(model.model.embed_tokens.weight)).norm()
    open_gates(model)
    assert positive() > 0.98
    after = layer.mixer.memory.q_proj(layer.mixer_norm(model.model.embed_tokens.weight)).norm()
    assert after < before and torch.equal(layer.mixer.memory_norm, torch.full((64,), 2.0))


@torch.no_grad()
def test_a_silenced_memory_comes_back():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = TitansForCausalLM(TitansConfig(vocab_size=12, memory_num_heads=1, **sizes)).eval()
    ids = torch.randint(12, (1, 9))
    before = model(ids).logits
    with silenced_memory(model):
        assert (model(ids).logits - before).abs().max() > 1e-4
    assert torch.equal(model(ids).logits, before)


@pytest.mark.slow
def test_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples/titans_stream.py"), "--pieces", "5"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert "1280 tokens read" not in done.stdout and "resumed after 1280 tokens" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("depth, steps, least", [(1, 100, 0.6), (2, 200, 0.15)])
def test_memories_of_one_and_two_matrices_train(depth, steps, least):
    """Item 12 of the specification: no NaN, and what is recalled comes from the memory (chance is 1 in 16)."""
    options = yaml.safe_load((RECIPES / "titans_needle/config.yaml").read_text())
    task = RecallRows(**options["task"] | {"pairs": 2})
    torch.manual_seed(0)
    config = TitansConfig(vocab_size=task.vocabulary, **options["model"] | {"memory_depth": depth})
    model = TitansForCausalLM(config)
    open_gates(model, **options["gates"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20)
        ids, labels = task.rows(32, 14 + step % 11, generator)
        loss = model(ids, labels=labels).loss
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        optimizer.step()
    ids, labels = task.rows(256, 24, torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        assert recall_accuracy(model, ids, labels) > least
        with silenced_memory(model):
            assert recall_accuracy(model, ids, labels) < 0.12
