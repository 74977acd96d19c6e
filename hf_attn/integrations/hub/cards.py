"""Model cards from a template of our own, checked without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# A wheel has the folder model_cards/ of the source tree here.
_PACKAGED = Path(__file__).with_name("templates")
TEMPLATES = _PACKAGED if any(_PACKAGED.glob("*.md")) else Path(__file__).resolve().parents[3] / "model_cards"
_REQUIRED = ("license", "library_name", "tags")


def write_card(file: Path, template: str, data: dict[str, Any], **fields: Any) -> None:
    """Write a card to `file` and check it.

    Args:
        template: file in `model_cards/` without its ending.
        data: metadata of the card, as `ModelCardData` takes it; entries that are None are left out.
        fields: every name the template uses except `card_data`.

    Raises ValueError when a field is missing or the card fails `check_card`.
    """
    source = TEMPLATES / f"{template}.md"
    names = set(re.findall(r"{{ *(\w+) *}}", source.read_text(encoding="utf-8"))) - {"card_data"}
    if missing := sorted(names - fields.keys()):
        raise ValueError(f"card template {template!r} also needs {', '.join(missing)}")
    metadata = ModelCardData(**{name: value for name, value in data.items() if value is not None})
    ModelCard.from_template(metadata, template_path=str(source), **fields).save(file)
    check_card(file)


def check_card(file: Path) -> None:
    """Raise ValueError unless the card has its metadata, an install line, an import of hf_attn and its metrics.

    The Hub's own validation needs a network; this one needs none.
    """
    card = ModelCard.load(file)
    data = card.data.to_dict()
    if missing := [name for name in _REQUIRED if not data.get(name)]:
        raise ValueError(f"the metadata of {file} lacks {', '.join(missing)}")
    for needed in ("pip install hf-attn", "import hf_attn"):
        if needed not in card.text:
            raise ValueError(f"{file} does not tell the reader: {needed}")
    for result in card.data.eval_results or []:
        if f"{result.metric_value:g}" not in card.text:
            raise ValueError(f"{file} names {result.metric_name} {result.metric_value:g} in its metadata only")
