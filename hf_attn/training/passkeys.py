"""Passkeys hidden in text and asked for at its end: training data and evaluation prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int
from hf_attn.training.data import IGNORED

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


KEY_DIGITS = 5


def key_is_held_out(key: int) -> bool:
    """Whether a 5-digit key is kept for evaluation: every tenth, by a hash, so that no digit gives it away."""
    return (key * 2654435761 >> 16) % 10 == 3


def draw_keys(count: int, generator: torch.Generator, held_out: bool) -> Tensor:
    """Digits int64 `[count, 5]` of keys that are held out, or of keys that are not."""
    keys: list[int] = []
    while len(keys) < count:
        drawn = torch.randint(10**KEY_DIGITS, (2 * count,), generator=generator).tolist()
        keys += [key for key in drawn if key_is_held_out(key) == held_out]
    powers = 10 ** torch.arange(KEY_DIGITS - 1, -1, -1)
    return torch.tensor(keys[:count])[:, None] // powers % 10


@dataclass(frozen=True)
class DigitPasskeys:
    """Passkeys in a tiny vocabulary, for models trained from scratch in minutes.

    A row is filler with one key in it behind the token that announces keys; at its end stand a question, the same
    announcement, and the key again. A digit is the same token wherever it stands, so what comes next is known from the
    digits before it, or from how far the announcement is.

    The easier task has `places`: a "7" in first place and in second place are two tokens, so that what to look for
    follows from the last token alone, and the question is not announced again.

    Ids: 0 padding, 1 landmark, 2 question, 3 what announces a key, from 4 on digits (10, or 10 for each of 5 places),
    then `filler` letters.

    Args:
        filler: letters, >= 1.
        decoys: share of the filler that is digits of no key, in [0, 1): a block must be recognised by what announces
            the key, not by its holding digits.
        places: whether a digit token carries its place in the key.
    """

    filler: int = 26
    decoys: float = 0.0
    places: bool = False

    padding = 0
    landmark = 1
    question = 2
    announce = 3
    first_digit = 4

    def __post_init__(self) -> None:
        require_int("filler", self.filler, 1)
        if not 0 <= self.decoys < 1:
            raise ValueError(f"decoys must be a share in [0, 1), got {self.decoys}")

    @property
    def digits(self) -> int:
        """Number of digit tokens."""
        return 10 * KEY_DIGITS if self.places else 10

    @property
    def first_letter(self) -> int:
        """The first id of the filler."""
        return self.first_digit + self.digits

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.first_letter + self.filler

    def rows(
        self, count: int, length: int, generator: torch.Generator, *, held_out: bool = False, depth: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows int64 `[count, length]`, whose last five tokens are the answer, and labels for them, -100 elsewhere.

        `depth` in [0, 1] puts every key there; None draws it evenly. Raises ValueError when a row has no room.
        """
        answer = self.first_digit + draw_keys(count, generator, held_out)
        if self.places:
            answer = answer + 10 * torch.arange(KEY_DIGITS)
        needle = torch.cat([torch.full((count, 1), self.announce), answer], 1)
        tail = torch.cat([torch.full((count, 1), self.question), answer if self.places else needle], 1)
        size = needle.shape[1]
        room = length - size - tail.shape[1]
        if room < 1:
            raise ValueError(f"a row needs at least {length - room + 1} tokens, got length={length}")
        letters = self._tokens(count, room, self.decoys, generator)
        place = torch.randint(room + 1, (count, 1), generator=generator)
        if depth is not None:
            place = torch.full((count, 1), round(depth * room))
        spots = torch.arange(room).expand(count, room)
        ids = torch.zeros(count, length, dtype=torch.long)
        ids.scatter_(1, spots + (spots >= place) * size, letters).scatter_(1, place + torch.arange(size), needle)
        ids[:, room + size :] = tail
        labels = torch.full_like(ids, IGNORED)
        labels[:, -KEY_DIGITS:] = answer
        return ids, labels

    def repeats(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows that repeat themselves, each with a period of its own, and labels where that says what comes next.

        Letters and digits, half each. Copying what followed earlier is what an answer needs, and here every token
        trains it. Periods are 6 to `length` - 6. Raises ValueError for rows below 12 tokens.
        """
        if length < 12:
            raise ValueError(f"rows that repeat themselves need at least 12 tokens, got length={length}")
        period = torch.randint(6, length - 5, (count, 1), generator=generator)
        place = torch.arange(length)
        ids = self._tokens(count, length, 0.5, generator).gather(1, place % period)
        # The first token of a repeat could be anything, and one token before it is not enough to find the place.
        return ids, torch.where(place >= period + 2, ids, IGNORED)

    def _tokens(self, count: int, length: int, digits: float, generator: torch.Generator) -> Tensor:
        """Letters, and a share of digits."""
        letters = self.first_letter + torch.randint(self.filler, (count, length), generator=generator)
        drawn = self.first_digit + torch.randint(self.digits, (count, length), generator=generator)
        return torch.where(torch.rand(count, length, generator=generator) < digits, drawn, letters)


_FILLER = (
    "Rain fell on the roof all night. The cat slept by the stove. A train passed far away. "
    "Leaves turned brown and dropped. The kettle began to hum. "
)


def passkey_text(length: int, generator: torch.Generator, *, held_out: bool = False) -> tuple[str, str]:
    """A prompt of about `length` characters that ends in "The pass key is", and the key (arXiv 2305.16300, 4.2).

    Five parts, one a line: the task, filler, the key stated twice, filler, the question. The key's place is drawn
    evenly over the filler.
    """
    key = "".join(map(str, draw_keys(1, generator, held_out)[0].tolist())).lstrip("0") or "0"
    before = int(torch.randint(length + 1, (), generator=generator))
    filler = _FILLER * (length // len(_FILLER) + 2)
    parts = [
        "Somewhere in the text below a pass key is given. Find it and keep it in mind, you will be asked for it.",
        filler[:before],
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        filler[: length - before],
        "What is the pass key? The pass key is",
    ]
    return "\n".join(parts), key
