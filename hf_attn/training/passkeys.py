"""Passkeys of spoken letters hidden in real text, asked for at the end: the data of DuoAttention's gate training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int

RADIO_ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()


@dataclass
class PasskeyText:
    """Rows of tokens: filler with `keys` passkeys at random depths, then every key asked for and answered.

    Args:
        tokenizer: `tokenizer(text, add_special_tokens=False)["input_ids"]` is a list of ids.
        filler: int64 `[tokens]`, a long real text; each row takes a stretch of it.
        keys: passkeys a row, >= 1.
        words: of the radio alphabet in each passkey, >= 1.
        depths: lowest and highest place of a passkey, as shares of the filler.
    """

    tokenizer: Any
    filler: Tensor
    keys: int = 10
    words: int = 32
    depths: tuple[float, float] = (0.05, 0.95)

    def __post_init__(self) -> None:
        require_int("keys", self.keys, 1)
        require_int("words", self.words, 1)
        low, high = self.depths
        if not 0 <= low < high <= 1:
            raise ValueError(f"depths must be two shares 0 <= low < high <= 1, got {self.depths}")

    def row(self, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One row of exactly `length` tokens: ids int64 `[length]`, and bool `[length]`, True on question and answers.

        Raises ValueError when the passkeys leave no room for text, or the filler is shorter than the room.
        """
        keys = [self._key(generator) for _ in range(self.keys)]
        needles = [self._encode(f"\nRemember passkey number {n}: {key}.\n") for n, key in enumerate(keys, 1)]
        answers = " ".join(f"Passkey number {n} is {key}." for n, key in enumerate(keys, 1))
        tail = self._encode(f"\n\nQuestion: which passkeys were given in the text above?\nAnswer: {answers}")
        room = length - len(tail) - sum(map(len, needles))
        if room < self.keys:
            raise ValueError(
                f"a row of {length} tokens has no room for text beside {self.keys} passkeys of {self.words} words "
                f"({length - room} tokens); use longer rows, fewer keys or fewer words"
            )
        if room > self.filler.numel():
            raise ValueError(
                f"a row of {length} tokens needs {room} tokens of text, the filler has {self.filler.numel()}"
            )
        start = int(torch.randint(self.filler.numel() - room + 1, (), generator=generator))
        low, high = self.depths
        places = (low + (high - low) * torch.rand(self.keys, generator=generator)).mul(room).long().sort().values
        parts, before = [], 0
        for place, needle in zip(places.tolist(), needles, strict=True):
            parts += [self.filler[start + before : start + place], torch.tensor(needle)]
            before = place
        parts += [self.filler[start + before : start + room], torch.tensor(tail)]
        labelled = torch.zeros(length, dtype=torch.bool)
        labelled[length - len(tail) :] = True
        return torch.cat(parts), labelled

    def _key(self, generator: torch.Generator) -> str:
        picked = torch.randint(len(RADIO_ALPHABET), (self.words,), generator=generator).tolist()
        return " ".join(RADIO_ALPHABET[i] for i in picked)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
