"""Prompts of instruction, documents and query, and batches of them (BlockRank, blockrank.md 2.1 to 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.call import TokenLayout
from hf_attn.checks import require_int
from hf_attn.integrations.transformers.masks import document_mask
from hf_attn.mechanisms.blockrank import BlockRankConfig, positions

TASK = (
    "You get a query and a list of documents, each written as ID: number | CONTENT: text | END ID: number. Find the "
    "documents that help to answer the query."
)
REQUEST = "Which document answers the query best? Print its ID."
LEAD_IN = "Final Answer:"
_MARK = "\u241e"  # stands for the content while a chat template is cut in two


@dataclass(frozen=True)
class RankingPrompt:
    """Token ids of one prompt.

    segments: instruction, every document, query block; truncated: documents that were cut.
    """

    segments: list[list[int]]
    truncated: int

    @property
    def num_documents(self) -> int:
        return len(self.segments) - 2


@dataclass(frozen=True)
class PromptBatch:
    """Rows of several prompts, left-padded, as a model with `hf_attn_blockrank` takes them.

    input_ids, position_ids int64 `[B, T]`; attention_mask int32 `[B, 3, 1, 2 T]` (`document_mask`); signals int64
    `[B, 2]`, slots of the last prompt token and the first completion token; candidates bool `[B, N]`; labels int64
    `[B, T]`, -100 but for completions that were given.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    signals: Tensor
    candidates: Tensor
    labels: Tensor

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        return {n: getattr(self, n) for n in ("input_ids", "position_ids", "attention_mask")}

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same prompts on another device."""
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


class PromptBuilder:
    """Turns queries and documents into token ids; segments are tokenized on their own, without special tokens.

    Args:
        tokenizer: of the model; its chat template is used where it has one.
        max_block_length: tokens of a document, its frame `ID: n | CONTENT: ... | END ID: n` included. Content beyond it
            is cut at the end.
        truncate: False raises ValueError instead of cutting.
    """

    def __init__(self, tokenizer: Any, max_block_length: int = 160, truncate: bool = True) -> None:
        require_int("max_block_length", max_block_length, 1)
        self.tokenizer, self.max_block_length, self.truncate = tokenizer, max_block_length, truncate
        self._before, self._after = self._chat_frame()

    def build(self, query: str, documents: Sequence[str]) -> RankingPrompt:
        """The prompt up to and including its lead-in; documents get the ids 0, 1, ... in the order given.

        Raises ValueError for an empty query, no documents, an empty document, or (`truncate=False`, and where not even
        the frame fits) one that is too long.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"query must be a text, got {query!r}")
        if isinstance(documents, str):
            raise TypeError("documents must be a list of texts, got one string; pass [text]")
        if not documents:
            raise ValueError("documents is empty: there is nothing to rank; pass at least one text")
        for number, text in enumerate(documents):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"documents[{number}] must be a text that is not empty, got {text!r}; leave it out")
        head = f"{self._before}{TASK}\nQuery: {query}\n\nDocuments:"
        tail = f"\n====\n{REQUEST}\nQuery: {query}\nThe best document follows.{self._after}{LEAD_IN}"
        blocks, truncated = self._documents(documents)
        return RankingPrompt([*self._ids([head]), *blocks, *self._ids([tail])], truncated)

    def completion(self, answers: Sequence[int]) -> list[int]:
        """Ids of ` [i1, i2, ...]` and the end of the turn: what follows the lead-in."""
        ids = self._ids([" [", ", ".join(str(answer) for answer in answers) + "]"])
        end = self.tokenizer.eos_token_id
        return ids[0] + ids[1] + ([] if end is None else [end])

    @property
    def signal(self) -> int:
        """First token of every completion, with which the prompt is continued to score."""
        return self._ids([" ["])[0][0]

    def _documents(self, documents: Sequence[str]) -> tuple[list[list[int]], int]:
        opened = self._ids([f"\nID: {number} | CONTENT:" for number in range(len(documents))])
        closed = self._ids([f" | END ID: {number}" for number in range(len(documents))])
        contents = self._ids([" " + " ".join(text.split()) for text in documents])
        blocks, truncated = [], 0
        for number, (first, content, last) in enumerate(zip(opened, contents, closed, strict=True)):
            room = self.max_block_length - len(first) - len(last)
            needed = len(first) + len(content) + len(last)
            if room < 1 or (needed > self.max_block_length and not self.truncate):
                raise ValueError(
                    f"documents[{number}] has {needed} tokens with its frame of {len(first) + len(last)}, more than "
                    f"max_block_length={self.max_block_length}; raise it, or cut the text"
                )
            truncated += len(content) > room
            blocks.append([*first, *content[:room], *last])
        return blocks, truncated

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, ids in zip(texts, found, strict=True):
            if not ids:
                raise ValueError(f"the tokenizer has no tokens for {text!r}; it cannot write ranking prompts")
        return found

    def _chat_frame(self) -> tuple[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            return "", "\n"
        turn = [{"role": "user", "content": _MARK}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, mark, after = text.partition(_MARK)
        if not mark or _MARK in after:
            raise ValueError("the chat template of the tokenizer does not write a user turn exactly once")
        return before, after


def batch_prompts(
    prompts: Sequence[RankingPrompt],
    completions: Sequence[Sequence[int]],
    options: BlockRankConfig,
    max_positions: int,
    *,
    labelled: bool = False,
) -> PromptBatch:
    """Rows of prompts and what follows each of them, padded on the left.

    Args:
        completions: token ids after each lead-in, at least one.
        options: of the mechanism (positions).
        max_positions: positions the model was trained on.
        labelled: make the completions labels.

    Raises ValueError for a prompt without documents, an empty completion, and positions that collide or do not fit.
    """
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if prompt.num_documents < 1:
            raise ValueError(
                f"prompt {number} has {len(prompt.segments)} segments; ranking needs at least one document"
            )
        if not len(completion):
            raise ValueError(f"completion {number} is empty: its first token is a signal token")
    rows = [[*p.segments[:-1], [*p.segments[-1], *c]] for p, c in zip(prompts, completions, strict=True)]
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    segments = torch.full((len(rows), width), -1)
    labels = torch.full((len(rows), width), -100)
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        flat = torch.tensor([token for segment in row for token in segment])
        ids[number, width - len(flat) :] = flat
        lengths = torch.tensor([len(segment) for segment in row])
        segments[number, width - len(flat) :] = torch.arange(len(row)).repeat_interleave(lengths)
        if labelled:
            labels[number, width - len(completion) :] = flat[len(flat) - len(completion) :]
    counts = torch.tensor([prompt.num_documents for prompt in prompts])
    layout = TokenLayout.documents(segments, counts + 2)
    offset = options.offset_of(max_positions)
    where = positions(layout, offset, options.permutation_invariant)
    if int(where.max()) >= max_positions:
        raise ValueError(
            f"the prompt needs position {int(where.max())}, the model has {max_positions}; lower "
            f"query_offset={offset}, shorten the query, or use a model with more positions"
        )
    first = width - torch.tensor([len(completion) for completion in completions])
    candidates = torch.arange(int(counts.max()))[None] < counts[:, None]
    signals = torch.stack([first - 1, first], 1)
    return PromptBatch(ids, where, document_mask(layout), signals, candidates, labels)
