"""Trainer and TRL's SFTTrainer: losses equal SDPA's, packed equals separate, and lost packing is found."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_attn.training.packing import PackedBatches, keep_packing
from tests.integrations.transformers.modes import MECHANISMS, equal, sparse
from tests.integrations.transformers.tiny import build, tokens

pytest.importorskip("accelerate")
ROWS = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (9, 5, 14, 7, 3, 11, 13, 6)]


def losses(trainer) -> list[float]:
    """The loss of every step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def options(folder, **more):
    """Two steps of two rows, logged."""
    shared = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    return {"output_dir": str(folder), **shared, **quiet, **more}


def padded(features) -> dict[str, torch.Tensor]:
    """A plain collator: right padding, a mask."""
    width = max(len(row["input_ids"]) for row in features)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in features])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def unpacked_loss(model, rows) -> float:
    """Mean loss over the tokens of separate rows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            predicted = len(row["input_ids"]) - 1
            total, count = total + float(model(ids, labels=ids).loss) * predicted, count + predicted
    return total / count


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_trainer_equals_sdpa(name, checkpointing, tmp_path, sparse_path):
    got = []
    for model in equal(name):
        args = TrainingArguments(**options(tmp_path, gradient_checkpointing=checkpointing))
        got.append(losses(Trainer(model, args=args, train_dataset=ROWS, data_collator=padded)))
    assert len(got[0]) == 2 and got[1] == pytest.approx(got[0], rel=1e-4)


@pytest.mark.parametrize("name", MECHANISMS)
def test_packed_rows_train_as_separate_ones(name, tmp_path, sparse_path):
    """With a mechanism that really drops: nothing of one sequence reaches another."""
    model = sparse(name)
    want = unpacked_loss(model, ROWS)
    args = TrainingArguments(**options(tmp_path, per_device_train_batch_size=len(ROWS), max_steps=1))
    trainer = Trainer(model, args=args, train_dataset=ROWS, data_collator=DataCollatorWithFlattening())
    assert losses(keep_packing(trainer)) == pytest.approx([want], rel=1e-4)


def test_keep_packing_forces_what_upstream_would_lose(tmp_path, sparse_path):
    """An all-ones mask in the batch, a cache in the config."""

    def with_mask(features):
        batch = DataCollatorWithFlattening()(features)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    args = TrainingArguments(**options(tmp_path, per_device_train_batch_size=len(ROWS), max_steps=1))
    trainer = Trainer(sparse("moba"), args=args, train_dataset=ROWS, data_collator=with_mask)
    with pytest.raises(ValueError, match=r"hf_attn_moba \(LlamaAttention\): position_ids restart.*keep_packing"):
        trainer.train()
    model = sparse("moba")
    want = unpacked_loss(model, ROWS)
    trainer = Trainer(model, args=args, train_dataset=ROWS, data_collator=with_mask)
    assert losses(keep_packing(keep_packing(trainer))) == pytest.approx([want], rel=1e-4)
    assert model.config.use_cache is False


def test_batches_without_borders_are_refused():
    with pytest.raises(ValueError, match="names no borders of sequences, got input_ids, labels"):
        PackedBatches(lambda rows: {k: v for k, v in padded(rows[:1]).items()})(ROWS)
    with pytest.raises(ValueError, match="a packed batch must not be padded"):
        PackedBatches(padded)(ROWS)


@pytest.mark.parametrize("lost", [{"use_cache": True}, {"attention_mask": torch.ones(1, 12, dtype=torch.long)}])
@torch.no_grad()
def test_lost_packing_is_seen(lost):
    """Raised in training, warned about in evaluation (where SDPA does the same)."""
    model, ids = sparse("streaming"), tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.warns(UserWarning, match="transformers dropped their borders"):
        model(ids, position_ids=positions, **lost)
    with pytest.raises(ValueError, match="use_cache=False and no attention_mask"):
        model.train()(ids, position_ids=positions, **lost)


@pytest.mark.filterwarnings("error::UserWarning")
@torch.no_grad()
def test_no_false_alarm():
    """Kept packing, padding with zero positions, decoding."""
    model, ids = sparse("streaming").train(), tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    model(ids, position_ids=positions, use_cache=False)
    model(ids, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :4] = 0
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    model.eval().generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", MECHANISMS)
def test_sft_trainer_with_packing(name, tmp_path, sparse_path):
    """TRL packs, names the borders and turns the cache off; losses equal SDPA's and those of separate rows."""
    trl = pytest.importorskip("trl", reason="TRL is in the extra 'recipes'")
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra 'recipes'")
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0", bos_token="1", eos_token="2")

    def run(model) -> list[float]:
        args = trl.SFTConfig(**options(tmp_path, packing=True, max_length=24, per_device_train_batch_size=4))
        data = datasets.Dataset.from_list(ROWS)
        trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        return losses(keep_packing(trainer))

    dense, ours = equal(name)
    assert run(ours) == pytest.approx(run(dense), rel=1e-4)
    assert run(sparse(name))[0] == pytest.approx(unpacked_loss(sparse(name), ROWS), rel=1e-3)
    assert run(sparse(name))[0] != pytest.approx(unpacked_loss(build("llama"), ROWS), rel=1e-3)
