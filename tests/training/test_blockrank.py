"""The contrastive loss, its gradients through a model, the corpus, the measures."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainingArguments

import hf_attn
from hf_attn.analysis.ranking import bm25, bootstrap_p, measures, rank_of
from hf_attn.bench.models import byte_tokenizer
from hf_attn.models.blockrank.scoring import captured_scores
from hf_attn.training.blockrank import BlockRankTrainer, RankingCollator, ranking_records
from hf_attn.training.docstrings import Entry, leakage, shared_run, split_by_module
from hf_attn.training.ranking import contrastive_loss
from tests.models.test_blockrank import DOCUMENTS, OPTIONS, QUERY, tiny


def test_loss_by_hand():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]], requires_grad=True)
    answers = torch.tensor([[0, -1], [1, 2], [-1, -1]])
    shares = (scores.detach() / 0.1).softmax(1)
    expected = -(math.log(shares[0, 0]) + math.log(shares[1, 1] + shares[1, 2])) / 2
    loss = contrastive_loss(scores, answers, 0.1)
    assert abs(loss.item() - expected) < 1e-6
    loss.backward()
    assert (scores.grad[2] == 0).all() and (scores.grad[:2] != 0).all()
    empty = contrastive_loss(scores, torch.full((3, 1), -1))
    assert float(empty) == 0 and torch.autograd.grad(empty, scores)[0].abs().sum() == 0
    candidates = torch.tensor([[True, True, False]])
    two = contrastive_loss(scores[:1, :2], answers[:1], 0.1)
    torch.testing.assert_close(contrastive_loss(scores[:1], answers[:1], 0.1, candidates), two)


def test_bad_losses():
    scores = torch.rand(1, 3)
    for answers, options, message in (
        ([[3]], {}, "answers must lie in -1"),
        ([[0]], {"temperature": 0}, "temperature must be > 0"),
        ([[2]], {"candidates": torch.tensor([[True, True, False]])}, "does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_loss(scores, torch.tensor(answers), **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_scoring_layer_and_nothing_above(checkpointing):
    model = tiny()
    ranker = hf_attn.BlockRanker(model, byte_tokenizer(), **OPTIONS)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = ranker.batch([QUERY], [DOCUMENTS], [[0]])
    with captured_scores(model, batch, [1]) as found:
        model(**batch.model_inputs, use_cache=False)
    contrastive_loss(ranker.combine(found[1]), torch.tensor([[0]]), 0.05, batch.candidates).backward()
    layers = model.model.layers
    for name in ("q_proj", "k_proj"):
        assert getattr(layers[1].self_attn, name).weight.grad.abs().max() > 0
    assert layers[1].self_attn.v_proj.weight.grad is None or layers[1].self_attn.v_proj.weight.grad.abs().max() == 0
    assert layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    above = [p.grad for p in layers[2].parameters()]
    assert all(grad is None or grad.abs().max() == 0 for grad in above)


def entries(count: int) -> list[Entry]:
    return [Entry(f"query {n}", f"document number {n}", f"file{n}.py") for n in range(count)]


def test_trainer_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    ranker = hf_attn.BlockRanker(tiny(), byte_tokenizer(), **OPTIONS)
    records = ranking_records(entries(3), 3, 3, seed=0) * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, learning_rate=5e-3, report_to=[],
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1, use_cpu=True,
    )  # fmt: skip
    loss = {"aux_weight": 1.0, "lm_weight": 0.1, "lm_every": 2}
    trainer = BlockRankTrainer(ranker, args=arguments, train_dataset=records, **loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Steps with the next-token loss (even) are compared with their like.
    assert sum(losses[-2:]) < sum(losses[:2])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        BlockRankTrainer(ranker, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_collator():
    ranker = hf_attn.BlockRanker(tiny(), byte_tokenizer(), **OPTIONS)
    records = [
        {"query": "a", "documents": ["x", "y"], "answers": [1]},
        {"query": "a longer one", "documents": ["x", "y", "z"], "answers": [0, 2]},
    ]
    batch = RankingCollator(ranker)(records)
    assert batch["answers"].tolist() == [[1, -1], [0, 2]]
    assert batch["candidates"].tolist() == [[True, True, False], [True, True, True]]
    decode = ranker.tokenizer.decode
    assert [decode(row[row != -100]) for row in batch["labels"]] == [" [1]<end>", " [0, 2]<end>"]
    for row, (last, first) in zip(batch["input_ids"], batch["signals"].tolist(), strict=True):
        assert decode(row[: last + 1]).endswith("Final Answer:") and first == last + 1


def test_records_corpus_and_leakage():
    found = entries(12)
    records = ranking_records(found, 6, 4, seed=1)
    assert records == ranking_records(found, 6, 4, seed=1) != ranking_records(found, 6, 4, seed=2)
    for record in records:
        number = record["query"].split()[1]
        assert record["documents"][record["answers"][0]] == f"document number {number}"
        assert len(set(record["documents"])) == 4
    with pytest.raises(ValueError, match="need as many entries, there are 12"):
        ranking_records(found, 13, 4, seed=1)
    train, held_out = split_by_module(found, 0.5)
    assert train and held_out
    assert leakage(train, held_out)["documents_in_both"] == leakage(train, held_out)["modules_in_both"] == 0
    assert leakage(found, found)["documents_in_both"] == 12
    assert shared_run("Return the sorted list", "it will return the sorted copy of a list") == 3
    assert shared_run("a b", "c d") == 0


def test_measures():
    assert rank_of([0.1, 0.4, 0.4], 2) == 2 and rank_of([0.1, 0.4, 0.4], 1) == 1
    found = measures([1, 2, 11])
    assert found["P@1"] == 1 / 3 and abs(found["nDCG@10"] - (1 + 1 / math.log2(3)) / 3) < 1e-9
    assert abs(found["MRR@10"] - 0.5) < 1e-9
    assert bootstrap_p([1.0] * 20, [0.0] * 20, draws=100) == 1 / 101
    assert bootstrap_p([0.0, 1.0], [1.0, 0.0], draws=200) > 0.3
    texts = ["the cat sat", "a dog ran far", "birds"]
    scores = bm25("cat", texts, texts)
    assert scores[0] > 0 == scores[1] == scores[2]
