"""The landmark recipe: `--smoke` ends, its loss falls, a run that was interrupted goes on; its data are right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

from hf_attn.bench.models import byte_tokenizer
from hf_attn.training.landmark import add_landmark_token, check_landmark_token, passkey_score
from hf_attn.training.passkeys import DigitPasskeys, draw_keys, key_is_held_out, passkey_text
from tests.models.families import host
from tests.models.test_landmark import LANDMARK, build
from tests.recipes.test_moba_recipes import RECIPES, script

pytest.importorskip("accelerate")


def smoke(output: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--smoke", "--output", str(output)])
    script("landmark").main()


def test_smoke_and_resume(tmp_path, monkeypatch, capsys):
    smoke(tmp_path, monkeypatch)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["variant"] for row in rows[:4]] == ["retrieval", "no blocks", "random blocks", "full attention"]
    assert {row["times"] for row in rows} == {1, 4}
    for row in rows:
        assert (row["read"] is None) == (row["variant"] == "full attention")
        assert row["read"] is None or (row["read"] == 0) == (row["variant"] == "no blocks")
    assert "| retrieval | 4x | 4 |" in capsys.readouterr().out
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(want).__name__ == "LandmarkLlamaForCausalLM"
    shutil.rmtree(tmp_path)

    # Killed in step 25, five steps behind a checkpoint: the second start ends with the same weights.
    step, calls = Trainer.training_step, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smoke(tmp_path, monkeypatch)
    assert (tmp_path / "checkpoints/checkpoint-20").is_dir() and not (tmp_path / "model").exists()
    smoke(tmp_path, monkeypatch)
    assert len(calls) == 25 + 10
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for mine, theirs in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_every_option_has_a_comment():
    for name in ("config.yaml", "plain.yaml", "smollm2.yaml"):
        text = (RECIPES / "landmark" / name).read_text()
        for option in yaml.safe_load(text):
            line = next(line for line in text.splitlines() if line.startswith(f"{option}:"))
            assert "#" in line, f"{name}: {option}"


@pytest.mark.parametrize("places", [False, True])
def test_rows_hold_one_key_and_its_answer(places):
    task, generator = DigitPasskeys(decoys=0.2, places=places), torch.Generator().manual_seed(0)
    tail = 6 if places else 7
    ids, labels = task.rows(300, 34 + tail, generator)
    assert ids.shape == labels.shape == (300, 34 + tail)
    assert bool((labels[:, :-5] == -100).all()) and torch.equal(ids[:, -5:], labels[:, -5:])
    assert bool((ids[:, -tail] == task.question).all()) and bool(((ids == task.announce).sum(1) == tail - 5).all())
    place = (ids == task.announce).int().argmax(1)
    told = ids.gather(1, place[:, None] + torch.arange(1, 6))
    assert torch.equal(told, ids[:, -5:])
    assert places == bool((ids[:, -1] >= task.first_digit + 40).all())
    # Depths are even: every quarter of the filler gets about a quarter of the keys.
    assert torch.histc(place.float(), 4, 0, 28).min() > 45
    digits = (ids >= task.first_digit) & (ids < task.first_letter)
    assert 0.1 < (digits.sum(1) - 10).float().mean() / 28 < 0.3
    first, last = (task.rows(1, 34 + tail, generator, depth=depth)[0][0] for depth in (0.0, 1.0))
    assert first[0] == task.announce and last[28] == task.announce
    with pytest.raises(ValueError, match=f"at least {7 + tail} tokens"):
        task.rows(1, 6 + tail, generator)
    with pytest.raises(ValueError, match="decoys must be a share"):
        DigitPasskeys(decoys=1.0)


def test_rows_that_repeat_themselves():
    """What is trained is always said by what came before: the last place with the same two tokens before it."""
    task, generator = DigitPasskeys(), torch.Generator().manual_seed(0)
    ids, labels = task.repeats(200, 30, generator)
    periods = set()
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        start = next(place for place, label in enumerate(wanted) if label != -100)
        period = start - 2
        periods.add(period)
        assert wanted[start:] == row[start:] == row[2 : 30 - period]
        assert set(wanted[:start]) == {-100}
    assert periods == set(range(6, 25))
    with pytest.raises(ValueError, match="at least 12 tokens"):
        task.repeats(1, 11, generator)


def test_rows_of_text_and_of_keys():
    """Every other batch asks for keys that evaluation never does; nothing else of those rows is trained."""
    module = script("landmark")
    tokenizer = byte_tokenizer()
    train = [{"input_ids": torch.full((400,), n), "labels": torch.full((400,), n)} for n in range(6)]
    options = {"seed": 0, "length": 400, "rows": 2, "steps": 6, "passkeys_every": 2}
    batches = module.tuning_batches(train, tokenizer, options)
    assert len(batches) == 6 and all(batch["input_ids"].shape == (2, 400) for batch in batches)
    assert sorted(int(row[0]) for batch in batches[1::2] for row in batch["input_ids"]) == list(range(6))
    for batch in batches[::2]:
        for ids, labels, mask in zip(*(batch[key] for key in ("input_ids", "labels", "attention_mask")), strict=True):
            text = tokenizer.decode(ids[mask.bool()].tolist())
            key = tokenizer.decode(labels[labels != -100].tolist()).strip()
            assert text.endswith(f"The pass key is {key}") and not key_is_held_out(int(key))
            assert 350 < int(mask.sum()) <= 400 and bool((labels[~mask.bool()] == -100).all())


def test_held_out_keys_are_never_trained_on():
    generator = torch.Generator().manual_seed(0)
    powers = 10 ** torch.arange(4, -1, -1)
    for held_out in (True, False):
        keys = (draw_keys(500, generator, held_out) * powers).sum(1).tolist()
        assert all(key_is_held_out(key) == held_out for key in keys)
        assert {key % 10 for key in keys} == set(range(10))
    text, key = passkey_text(400, generator, held_out=True)
    assert key_is_held_out(int(key)) and len(re.findall(key, text)) == 2 and text.endswith("The pass key is")


@torch.no_grad()
def test_score_counts_keys_and_digits():
    """A model that repeats its last token is right where the answer does."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=20, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.zero_()
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.copy_(torch.eye(20))
    prompts = torch.tensor([[3, 5], [3, 6], [3, 7]])
    answers = torch.tensor([[5, 5], [6, 1], [2, 2]])
    score = passkey_score(model, prompts, answers, dense=True)
    assert (score.exact, score.digits, score.read) == (pytest.approx(1 / 3), 0.5, None)


class Words:
    """A tokenizer with only what the helper asks for."""

    unk_token_id = 0
    additional_special_tokens: list[str] = []

    def __init__(self, room: bool = True) -> None:
        self.words, self.room = {"<unk>": 0, "a": 1}, room

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def add_special_tokens(self, tokens: dict[str, list[str]]) -> int:
        if not self.room:
            return 0
        for token in tokens["additional_special_tokens"]:
            self.words.setdefault(token, len(self.words))
        return 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.words.get(token, 0)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.words.get(text, 0)]}


def test_tokens_of_tokenizers():
    tokenizer = Words()
    assert add_landmark_token(tokenizer) == 2 == add_landmark_token(tokenizer)
    with pytest.raises(ValueError, match="has no room for another token"):
        add_landmark_token(Words(room=False))
    model = build()
    with pytest.raises(ValueError, match="the tokenizer has it as 2"):
        check_landmark_token(tokenizer, model)
    with pytest.raises(ValueError, match="has no such token"):
        check_landmark_token(Words(), model)
    tokenizer.words["<landmark>"] = LANDMARK
    check_landmark_token(tokenizer, model)
    model.config.landmark_token_id = tokenizer.words["<landmark>"] = LANDMARK + 1
    with pytest.raises(ValueError, match="extended after the model"):
        check_landmark_token(tokenizer, model)
    with pytest.raises(ValueError, match="is no landmark model"):
        check_landmark_token(tokenizer, host("llama"))


@pytest.mark.slow
def test_example(tiny_model, tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples/landmark_retrieval.py"), "--model", tiny_model, "--tokens", "600"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert "LandmarkLlamaForCausalLM" in done.stdout and "blocks read while decoding" in done.stdout
