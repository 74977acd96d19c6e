"""Training a BlockRanker with transformers' Trainer: records, collator, and the two losses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from hf_attn.checks import require_int
from hf_attn.models.blockrank.prompt import PromptBatch
from hf_attn.models.blockrank.ranker import BlockRanker
from hf_attn.models.blockrank.scoring import captured_scores, first_layer_scores
from hf_attn.training.ranking import contrastive_loss

Record = dict[str, Any]
_PARTS = ("input_ids", "position_ids", "attention_mask", "signals", "candidates", "labels")


def ranking_records(entries: Sequence[Any], count: int, num_documents: int, seed: int) -> list[Record]:
    """Lists to rank: `{"query", "documents", "answers": [number]}`, the negatives drawn from the same entries.

    Args:
        entries: objects with `query` and `document`.
        count: records; every one asks for another entry, in a random order of `seed`.
        num_documents: documents of a record, its own one included, at a random place; >= 1.

    Raises ValueError when there are fewer entries than needed.
    """
    require_int("num_documents", num_documents, 1)
    if len(entries) < max(count, num_documents):
        raise ValueError(f"{count} records of {num_documents} documents need as many entries, there are {len(entries)}")
    draw = random.Random(seed)
    records = []
    for own in draw.sample(range(len(entries)), count):
        others = [number for number in draw.sample(range(len(entries)), num_documents) if number != own]
        place = draw.randrange(num_documents)
        order = [*others[: num_documents - 1][:place], own, *others[: num_documents - 1][place:]]
        documents = [entries[number].document for number in order]
        records.append({"query": entries[own].query, "documents": documents, "answers": [place]})
    return records


class RankingCollator:
    """Records to model inputs: prompts, positions, document mask, labels, signal tokens and answers."""

    def __init__(self, ranker: BlockRanker) -> None:
        self.ranker = ranker

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        answers = [record["answers"] for record in records]
        batch = self.ranker.batch([r["query"] for r in records], [r["documents"] for r in records], answers).to("cpu")
        width = max(map(len, answers))
        padded = torch.tensor([[*found, *[-1] * (width - len(found))] for found in answers])
        return {**{name: getattr(batch, name) for name in _PARTS}, "answers": padded}


class BlockRankTrainer(Trainer):
    """Trainer with L = lm_weight * next-token loss of the completion + aux_weight * contrastive loss on attention.

    Args:
        ranker: its model is trained; its scoring layer and heads are those of the loss.
        temperature: of the contrastive loss, > 0.
        aux_weight, lm_weight: >= 0. The paper has 0.1 and 1; the next-token loss matters less where attention ranks.
        lm_every: micro-batches from one with the next-token loss to the next; the others end at the scoring layer
            (with several processes they run all layers, so that every parameter takes part).
        options: of `transformers.Trainer`; `remove_unused_columns=False` is needed in its arguments.
    """

    def __init__(
        self,
        ranker: BlockRanker,
        *,
        temperature: float = 0.05,
        aux_weight: float = 0.1,
        lm_weight: float = 1.0,
        lm_every: int = 1,
        **options: Any,
    ) -> None:
        for name, value in (("aux_weight", aux_weight), ("lm_weight", lm_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        require_int("lm_every", lm_every, 1)
        if options["args"].remove_unused_columns:
            raise ValueError("BlockRankTrainer needs TrainingArguments(remove_unused_columns=False)")
        super().__init__(model=ranker.model, data_collator=RankingCollator(ranker), **options)
        self.ranker, self.temperature = ranker, temperature
        self.aux_weight, self.lm_weight, self.lm_every = aux_weight, lm_weight, lm_every
        self.model_accepts_loss_kwargs = False
        self._micro = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the host's."""
        batch, answers = PromptBatch(**{name: inputs[name] for name in _PARTS}), inputs["answers"]
        layer = self.ranker.score_layer
        with_lm = self.lm_weight > 0 and (not model.training or self._micro % self.lm_every == 0)
        self._micro += model.training
        loss: Tensor | float = 0.0
        # Processes that average gradients need whole forward passes: one cut short would leave its gradients out.
        if with_lm or self.args.world_size > 1:
            # Completions end every row, so the head runs on the longest of them only.
            longest = int((batch.labels != -100).sum(1).max())
            with captured_scores(model, batch, [layer]) as found:
                logits = model(**batch.model_inputs, use_cache=False, logits_to_keep=longest + 1).logits
            targets = batch.labels[:, -longest:].flatten()
            weight = self.lm_weight if with_lm else 0.0
            loss = weight * cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
        else:
            found = first_layer_scores(model, batch, [layer])
        scores = self.ranker.combine(found[layer])
        loss = loss + self.aux_weight * contrastive_loss(scores, answers, self.temperature, batch.candidates)
        return (loss, {"scores": scores}) if return_outputs else loss
