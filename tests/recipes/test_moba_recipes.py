"""The recipes of MoBA: `--smoke` ends, its losses fall, and a run that was interrupted goes on."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

RECIPES = Path(__file__).parents[2] / "recipes"

pytest.importorskip("accelerate")


def script(recipe: str) -> ModuleType:
    """The recipe's script as a module: in this process, which has everything loaded."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", RECIPES / recipe / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def smoke(recipe: str, output: Path, monkeypatch, *more: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--smoke", "--output", str(output), *more])
    script(recipe).main()


def test_pretrain_on_text(tmp_path, monkeypatch, capsys):
    smoke("moba_pretrain", tmp_path, monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["sliding window only", "dense", "moba", "moba + kconv3"]
    for name, (row,) in results.items():
        assert row["start_loss"] == pytest.approx(5.5, abs=0.1) and row["loss"] < 4.3, name
        assert (row["density"] is not None and row["density"] < 0.9) == name.startswith("moba"), name
    assert "| moba + kconv3 |" in capsys.readouterr().out and (tmp_path / "results.md").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moba + kconv3-0" / "model")
    assert type(model).__name__ == "MobaHybridForCausalLM" and model.config._attn_implementation == "hf_attn_moba"

    # The last variant is interrupted after its first checkpoint; the others are done and are not repeated.
    folder = tmp_path / "moba + kconv3-0"
    want = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    smoke("moba_pretrain", tmp_path, monkeypatch)
    again = json.loads((folder / "result.json").read_text())
    assert again["loss"] == pytest.approx(want["loss"], rel=1e-4)


def test_pretrain_on_recall(tmp_path, monkeypatch):
    smoke("moba_pretrain", tmp_path, monkeypatch, "--config", str(RECIPES / "moba_pretrain" / "recall.yaml"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["dense", "moba", "moba + kconv3"]
    for (row,) in results.values():
        assert row["loss"] < row["start_loss"] - 0.3 and 0 <= row["accuracy"] <= 1


def test_convert(tmp_path, monkeypatch):
    """Training starts at the dense model's loss and ends below MoBA switched on without training (item 16)."""
    smoke("moba_convert", tmp_path, monkeypatch)
    loss = json.loads((tmp_path / "results.json").read_text())
    assert loss["moba, first step of the schedule"] == pytest.approx(loss["dense"], abs=1e-3)
    assert loss["moba, not trained"] != pytest.approx(loss["dense"], abs=1e-4)
    assert loss["moba, trained"] < loss["moba, not trained"] - 0.1
    adapter = tmp_path / "result"
    assert (adapter / "adapter_model.safetensors").is_file()
    from safetensors.torch import load_file

    names = [name for name in load_file(adapter / "adapter_model.safetensors") if "k_conv1d" in name]
    assert len(names) == 1, "the layer that runs MoBA; the last three stay dense"


def test_every_option_is_commented():
    """In config.yaml every top-level option and every leaf has a comment, or a group comment above it."""
    for recipe in ("moba_pretrain", "moba_convert", "vmoba_finetune"):
        text = (RECIPES / recipe / "config.yaml").read_text()
        for option in yaml.safe_load(text):
            line = next(line for line in text.splitlines() if line.startswith(f"{option}:"))
            assert "#" in line, f"{recipe}: {option}"


def test_schedule_falls_from_dense_to_its_target():
    from hf_attn.training.schedule import TopKSchedule

    schedule = TopKSchedule(target=4, blocks=32, share=0.5)
    values = [schedule.top_k(step, 20) for step in range(20)]
    assert values[0] == 32 and values[10:] == [4] * 10 and values == sorted(values, reverse=True)
    assert TopKSchedule(4, 32, 0).top_k(0, 20) == 4 and TopKSchedule(8, 2).top_k(0, 20) == 8
    with pytest.raises(ValueError, match="share must lie in"):
        TopKSchedule(4, 32, 2)


def test_two_stage_training_switches_and_gives_back():
    from transformers import TrainerControl, TrainerState, TrainingArguments

    import hf_attn
    from hf_attn.training.schedule import AttentionSwitch, set_options
    from tests.integrations.transformers.tiny import build

    model = hf_attn.apply(build("llama"), "moba", block_size=4)
    switch = AttentionSwitch(after=0.9)
    state = TrainerState(max_steps=10)
    seen = []
    for state.global_step in range(10):
        switch.on_step_begin(TrainingArguments("x"), state, TrainerControl(), model=model)
        seen.append(model.config._attn_implementation)
    switch.on_train_end(None, state, None, model=model)
    assert seen == ["hf_attn_moba"] * 9 + ["sdpa"] and model.config._attn_implementation == "hf_attn_moba"
    with pytest.raises(ValueError, match="uses no mechanism"):
        set_options(hf_attn.remove(model), top_k=3)


def test_recall_rows_are_answerable_and_bad_sizes_are_refused():
    from hf_attn.training.data import associative_recall, blocks, reference_text

    (row,) = associative_recall(1, 64, pairs=4, queries=10, vocabulary=33, seed=0)
    ids, labels = row["input_ids"].tolist(), row["labels"]
    told = {ids[i]: ids[i + 1] for i in range(0, 44, 2) if ids[i]}
    assert len(told) == 4 and (labels >= 0).sum() == 10
    assert all(told[ids[i]] == ids[i + 1] == labels[i + 1] for i in range(44, 64, 2))
    with pytest.raises(ValueError, match="need length >= 28"):
        associative_recall(1, 26, pairs=4, queries=10, vocabulary=33, seed=0)
    with pytest.raises(ValueError, match="longer than the text"):
        blocks([1, 2], 3)
    train, held_out = reference_text()
    assert 300_000 < len(train) and 20_000 < len(held_out) and held_out[:200] not in train
    assert torch.equal(blocks([1, 2, 3, 4, 5], 2)[1]["labels"], torch.tensor([3, 4]))
