"""Cards of converted models and adapters, `hf-attn card` and `hf-attn push`: filled, checked, never overwritten."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli.app import app
from hf_attn.integrations.hub.cards import check_card
from hf_attn.models.cards import check_folder, write_model_card
from tests.models.families import MOBA, host

peft = pytest.importorskip("peft")


def command(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments], env={"COLUMNS": "400"})


@pytest.fixture
def folder(tmp_path):
    model = hf_attn.convert(host("llama"), "moba", **MOBA)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_card_of_a_model(folder):
    result = command(
        "card", folder, "--data", "two books", "--trained", "the convolutions", "--license", "mit", "--base-model",
        "me/base", "--metric", "held-out loss=2.5,3.25,2.625", "--metric", "accuracy=0.5,,0.75",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = (folder / "README.md").read_text()
    assert "| held-out loss | 2.5 | 3.25 | 2.625 |" in text and "| accuracy | 0.5 | - | 0.75 |" in text
    assert "two books" in text and "the convolutions" in text and "up to 128 tokens" in text
    assert "`model.layers.*.self_attn.k_conv1d.weight`" in text
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model == "me/base" and card.data.tags == ["hf-attn", "moba"]
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {"held-out loss": 2.625, "accuracy": 0.75}
    check_folder(folder)


def test_results_of_a_recipe(folder, tmp_path):
    facts = {"data": "a book", "metrics": {"loss": {"dense": 1.5, "after": 1.25}}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert command("card", folder, "--results", tmp_path / "facts.json").exit_code == 0
    assert "| loss | 1.5 | 1.25 |" in (folder / "README.md").read_text()


def test_facts_travel_with_the_checkpoint(tmp_path):
    model = hf_attn.convert(host("llama"), "moba", **MOBA)
    hf_attn.set_card(model, data="a book")
    hf_attn.set_card(model, metrics={"loss": {"dense": 1.5, "after": 1.25}})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["k_conv1d"]))
    hf_attn.set_card(adapted, trained="LoRA on q")
    adapted.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "a book" in text and "LoRA on q" in text and "| loss | 1.5 | 1.25 |" in text and "fingerprint" in text
    assert 'hf_attn.load_adapter("the-base-model", "this-repository")' in text
    check_card(tmp_path / "README.md")
    check_folder(tmp_path)


def test_a_card_that_somebody_wrote_is_kept(folder):
    (folder / "README.md").write_text("mine")
    result = command("card", folder)
    assert result.exit_code == 2 and "never overwritten" in result.output
    result = command("push", folder, "me/x", "--data", "a book")
    assert result.exit_code == 2 and "was written by hand, so data would be lost" in result.output
    assert (folder / "README.md").read_text() == "mine"


def test_what_is_not_pushed(folder, tmp_path):
    """Refused before anything is sent: the tests' Hub is offline, and no message is about it."""
    for arguments, message in (
        ((tmp_path / "nowhere", "me/x"), "no such folder"),
        ((tmp_path, "me/x"), "holds no converted model"),
        ((folder, "me/x", "--metric", "loss"), "--metric is NAME=DENSE,BEFORE,AFTER"),
    ):
        result = command("push", *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    (folder / "training_args.bin").write_bytes(b"")
    assert "only safetensors and JSON are pushed" in command("push", folder, "me/x").output
    (folder / "training_args.bin").unlink()
    (folder / "model.safetensors").unlink()
    assert "is incomplete: it lacks *.safetensors" in command("push", folder, "me/x").output


def test_bad_facts(folder):
    with pytest.raises(ValueError, match="a card has no trainer; it has trained, data"):
        write_model_card(folder, trainer="me")
    with pytest.raises(ValueError, match=r"metrics\['loss'\] must be numbers by column"):
        write_model_card(folder, metrics={"loss": {"dens": 1}})
    with pytest.raises(ValueError, match="is no converted model"):
        hf_attn.set_card(host("llama"), data="a book")


@pytest.mark.parametrize("name", ["convert", "card", "push"])
def test_help_has_an_example(name):
    result = command(name, "--help")
    assert result.exit_code == 0 and f"hf-attn {name}" in result.output
