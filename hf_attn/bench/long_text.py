"""A long real text with a question about it, cut to an exact number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn.analysis.texts import python_reference_text

QUESTION = "Question: According to the text above, what is an assert statement used for? Answer in one sentence."


def prompt_of_length(tokenizer: Any, total: int, answer_tokens: int, question: str = QUESTION) -> Tensor:
    """Chat prompt `[1, total - answer_tokens]`: the text cut so that text, question and answer are `total` tokens.

    Raises ValueError when the question alone does not fit, or the text is too short.
    """
    marker = "<<<text>>>"
    chat = [{"role": "user", "content": f"{marker}\n\n{question}"}]
    if tokenizer.chat_template:
        head, tail = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(marker)
    else:
        head, tail = "", f"\n\n{question}\n"

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before, after = encode(head), encode(tail)
    room = total - answer_tokens - len(before) - len(after)
    if room < 1:
        raise ValueError(f"length {total} has no room for the question and an answer of {answer_tokens} tokens")
    body = encode(python_reference_text()[: 16 * room])[:room]
    if len(body) < room:
        raise ValueError(f"length {total} is longer than the text: at most {total - room + len(body)} tokens")
    return torch.tensor([before + body + after])
