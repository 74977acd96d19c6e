"""Packed training: keep what transformers would silently drop, the borders between the sequences of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_packing(trainer: Any) -> Any:
    """Make a `Trainer` or TRL `SFTTrainer` keep the borders of packed sequences; returns the trainer.

    transformers loses them without a word when a cache is asked for or when an attention mask is given. This turns the
    cache off in the arguments and in the model's config, takes all-ones masks out of the batches, and raises ValueError
    at the first batch that says no borders.
    """
    trainer.args.use_cache = False
    trainer.model.config.get_text_config().use_cache = False
    trainer.model.config.use_cache = False
    if not isinstance(trainer.data_collator, PackedBatches):
        trainer.data_collator = PackedBatches(trainer.data_collator)
    return trainer


class PackedBatches:
    """A collator that checks another one: `collator(features)` must be packed rows whose borders a model can see."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """The batch without `attention_mask`; raises ValueError when it has padding or names no borders."""
        batch = self.collator(features)
        mask = batch.pop("attention_mask", None)
        if mask is not None and not bool((mask == 1).all()):
            raise ValueError(
                "a packed batch must not be padded, got an attention_mask with zeros; flatten the sequences instead "
                "(transformers.DataCollatorWithFlattening, or TRL's SFTConfig(packing=True))"
            )
        if batch.get("position_ids") is None and batch.get("cu_seq_lens_q") is None:
            raise ValueError(
                f"the batch names no borders of sequences, got {', '.join(sorted(batch))}; it needs position_ids that "
                "restart at 0, or cu_seq_lens_q (transformers.DataCollatorWithFlattening, or TRL's "
                "SFTConfig(packing=True, packing_strategy='bfd'))"
            )
        return batch
