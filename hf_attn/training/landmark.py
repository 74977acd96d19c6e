"""Landmark tokens in tokenizers and batches (arXiv 2305.16300, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int

LANDMARK = "<landmark>"
IGNORED = -100


def add_landmark_token(tokenizer: Any, token: str = LANDMARK) -> int:
    """Add the landmark to a tokenizer as a special token and return its id; harmless when it is there already.

    Give the id to `hf_attn.convert(model, "landmark", token_id=...)`. Raises ValueError for a tokenizer that cannot
    take a token, or that would cut it into pieces.
    """
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        known = getattr(tokenizer, "extra_special_tokens", None) or getattr(tokenizer, "additional_special_tokens", [])
        added = tokenizer.add_special_tokens({"additional_special_tokens": [*list(known), token]})
        if not added:
            raise ValueError(
                f"{type(tokenizer).__name__} has no room for another token: it refused {token!r}. Name one of its "
                "unused tokens instead (token=...)"
            )
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == getattr(tokenizer, "unk_token_id", None):
        raise ValueError(f"{type(tokenizer).__name__} does not know {token!r} after adding it; use another tokenizer")
    pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
    if pieces != [found]:
        raise ValueError(f"{type(tokenizer).__name__} cuts {token!r} into {pieces} instead of the one id {found}")
    return found


def check_landmark_token(tokenizer: Any, model: Any, token: str = LANDMARK) -> None:
    """Raise ValueError unless `tokenizer` and a landmark model agree on the landmark."""
    found = tokenizer.get_vocab().get(token)
    wanted = getattr(model.config, "landmark_token_id", None)
    if wanted is None:
        raise ValueError(f"{type(model).__name__} is no landmark model; convert it: hf_attn.convert(model, 'landmark')")
    if found != wanted:
        what = "has no such token" if found is None else f"has it as {found}"
        raise ValueError(
            f"the model's landmark is id {wanted}, the tokenizer {what} ({token!r}); use the tokenizer that was saved "
            "with the model, or add the token before convert (add_landmark_token)"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if found >= rows:
        raise ValueError(
            f"the landmark's id {found} is no row of the embedding ({rows} rows); the tokenizer was extended after the "
            "model: call model.resize_token_embeddings(len(tokenizer))"
        )


def insert_landmarks(ids: list[int], block_size: int, landmark: int) -> list[int]:
    """One landmark after every `block_size - 1` tokens; an incomplete last block has none.

    Raises ValueError when the landmark is in `ids` already, or for a block_size below 2.
    """
    require_int("block_size", block_size, 2)
    if landmark in ids:
        raise ValueError(f"landmarks (id {landmark}) are in the tokens already; insert them once")
    regular = block_size - 1
    found: list[int] = []
    for start in range(0, len(ids), regular):
        part = ids[start : start + regular]
        found += part + [landmark] * (len(part) == regular)
    return found


def strip_landmarks(ids: list[int], landmark: int) -> list[int]:
    """The tokens without landmarks: undoes `insert_landmarks`."""
    return [token for token in ids if token != landmark]


def shift_labels(labels: list[int], block_size: int) -> list[int]:
    """Labels for a sequence with landmarks, under the usual shift by one: a landmark is no target and predicts nothing.

    The last token of a block is trained to predict the first of the next one, so that token's label stands at the
    landmark's place, and its own place is ignored.
    """
    require_int("block_size", block_size, 2)
    regular = block_size - 1
    found: list[int] = []
    for start in range(0, len(labels), regular):
        part = labels[start : start + regular]
        # Behind a landmark: this label has moved to the landmark's place.
        found += ([IGNORED] if start else []) + part[1:] if start else part
        if len(part) == regular:
            following = labels[start + regular : start + regular + 1]
            found += following or [IGNORED]
    return found


@dataclass
class LandmarkCollator:
    """Batches with landmarks in them, for models with `landmark_insert=False` or other training code.

    Models that insert landmarks by themselves (the default) take plain batches and need none of this.

    Args:
        block_size: tokens of a block, the landmark included, >= 2.
        landmark: id of the landmark token.
        pad: id of padding, at the right.
        include_landmark_in_loss: train landmarks as targets and inputs like other tokens (the original's unfused path)
            instead of leaving them out.
    """

    block_size: int
    landmark: int
    pad: int
    include_landmark_in_loss: bool = False

    def __post_init__(self) -> None:
        require_int("block_size", self.block_size, 2)
        require_int("landmark", self.landmark, 0)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `position_ids` and `labels` `[B, longest]` of features without landmarks."""
        rows = []
        for feature in features:
            ids = [int(token) for token in feature["input_ids"]]
            labels = [int(token) for token in feature.get("labels", ids)]
            full = insert_landmarks(ids, self.block_size, self.landmark)
            if self.include_landmark_in_loss:
                marks = insert_landmarks(labels, self.block_size, self.landmark)
            else:
                marks = shift_labels(labels, self.block_size)
            rows.append((full, marks))
        width = max(len(full) for full, _ in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        for full, marks in rows:
            spare = width - len(full)
            batch["input_ids"].append(full + [self.pad] * spare)
            batch["labels"].append(marks + [IGNORED] * spare)
            batch["attention_mask"].append([1] * len(full) + [0] * spare)
            batch["position_ids"].append(list(range(len(full))) + [0] * spare)
        return {name: torch.tensor(values) for name, values in batch.items()}


@dataclass
class PasskeyScore:
    """How often keys were found, and what was read for it.

    exact: share of prompts whose whole key was generated. digits: share of single digits. read: blocks read over blocks
    cached while decoding, None without retrieval.
    """

    prompts: int
    exact: float
    digits: float
    read: float | None


@torch.no_grad()
def passkey_score(
    model: Any,
    prompts: Tensor,
    answers: Tensor,
    *,
    batch: int = 16,
    dense: bool = False,
    progress: Callable | None = None,
) -> PasskeyScore:
    """Greedy decoding of the answers of prompts of one length.

    Args:
        model: a landmark model (any causal language model with `dense=True`).
        prompts: int64 `[P, T]`; answers: int64 `[P, A]`.
        batch: prompts at a time.
        dense: without a cache, every token reading every block.
        progress: called with the number of prompts done.
    """
    import hf_attn

    training = model.training
    model.eval()
    hf_attn.reset_stats(model)
    found = []
    for start in range(0, prompts.shape[0], batch):
        ids = prompts[start : start + batch].to(model.device)
        found.append(_decode(model, ids, answers.shape[1], dense).cpu())
        if progress is not None:
            progress(min(start + batch, prompts.shape[0]))
    model.train(training)
    right = torch.cat(found) == answers
    counts = hf_attn.stats(model)["totals"]["counts"]
    cached = counts.get("decode_blocks_cached", 0)
    read = counts["decode_blocks_read"] / cached if cached else None
    return PasskeyScore(prompts.shape[0], float(right.all(1).float().mean()), float(right.float().mean()), read)


def _decode(model: Any, ids: Tensor, count: int, dense: bool) -> Tensor:
    if not dense:
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return done[:, -count:]
    for _ in range(count):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -count:]
