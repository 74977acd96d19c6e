"""Real text for calibration and training: where it comes from, and how it is cut into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn.checks import require_int

# Topics of the language reference that Python ships; the one the demo's question is about comes first.
_FIRST = "assert"


def python_reference_text() -> str:
    """The topics of `pydoc_data`, one after the other: about 500 kB of English prose on Python."""
    from pydoc_data.topics import topics

    names = [_FIRST, *sorted(name for name in topics if name != _FIRST)]
    return "\n\n".join(topics[name].strip() for name in names)


def read_texts(files: Iterable[str | Path]) -> list[str]:
    """The files' contents (UTF-8), the Python reference when there are none; OSError names a file that is missing."""
    files = list(files)
    if not files:
        return [python_reference_text()]
    return [Path(file).read_text(encoding="utf-8") for file in files]


def token_windows(tokenizer: Any, texts: Iterable[str], *, length: int, count: int | None = None) -> Tensor:
    """Texts cut into rows of exactly `length` tokens, int64 `[rows, length]`, without padding or special tokens.

    Args:
        tokenizer: `tokenizer(text, add_special_tokens=False)["input_ids"]` is a list of ids.
        texts: in order; a row never spans two texts, and the rest of a text that fills no row is left out.
        length: tokens of a row, >= 1.
        count: rows at most, >= 1; all there are when None.

    Raises ValueError when no text fills a row.
    """
    require_int("length", length, 1)
    if count is not None:
        require_int("count", count, 1)
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, got one string; pass [text]")
    rows: list[Tensor] = []
    longest = 0
    for text in texts:
        missing = None if count is None else count - len(rows)
        if missing == 0:
            break
        # No tokenizer makes fewer than one token of 32 characters of prose; tokenizing a whole library would be slow.
        text = text if missing is None else text[: 32 * missing * length]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = max(longest, len(ids))
        full = len(ids) // length if missing is None else min(len(ids) // length, missing)
        rows += torch.tensor(ids[: full * length], dtype=torch.int64).view(full, length).unbind()
    if not rows:
        raise ValueError(
            f"no text has {length} tokens, the longest has {longest}; pass longer texts, or at most {longest} tokens a "
            "row (length)"
        )
    return torch.stack(rows)
