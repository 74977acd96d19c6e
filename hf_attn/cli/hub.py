"""`hf-attn card DIR` and `hf-attn push DIR REPO`: publish a converted model, or an adapter of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

import hf_attn
from hf_attn.cli.common import console, one_clear_line

_RESULTS = typer.Option(None, "--results", help='JSON with the fields below and "metrics".')
_METRIC = typer.Option([], "--metric", help="NAME=DENSE,BEFORE,AFTER; repeatable, a value may be left empty.")
_TRAINED = typer.Option(None, help="What was trained, in words.")
_DATA = typer.Option(None, help="On which data.")
_LENGTHS = typer.Option(None, help="Supported lengths.")
_LICENSE = typer.Option(None, help="Licence, as the Hub spells it.")
_BASE = typer.Option(None, "--base-model", help="Hub id of the base model.")


def card(
    folder: Path = typer.Argument(..., metavar="DIR", help="Folder of a converted model, or of an adapter of one."),
    results: Path = _RESULTS,
    metric: list[str] = _METRIC,
    trained: str = _TRAINED,
    data: str = _DATA,
    lengths: str = _LENGTHS,
    license: str = _LICENSE,
    base_model: str = _BASE,
) -> None:
    """Write the model card, README.md, from what the folder says about itself. One that somebody wrote is kept.

    Example: `hf-attn card smollm2-moba --data "Python reference" --metric "held-out loss=2.68,3.06,2.99"`
    """
    from hf_attn.models.cards import write_model_card

    with one_clear_line():
        facts = _facts(results, metric, trained, data, lengths, license, base_model)
        file = write_model_card(folder, **facts)
    console.print(f"wrote {file}", highlight=False, soft_wrap=True)


def push(
    folder: Path = typer.Argument(..., metavar="DIR", help="Folder of a converted model, or of an adapter of one."),
    repo: str = typer.Argument(..., help="Hub id, as in me/my-model."),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    results: Path = _RESULTS,
    metric: list[str] = _METRIC,
    trained: str = _TRAINED,
    data: str = _DATA,
    lengths: str = _LENGTHS,
    license: str = _LICENSE,
    base_model: str = _BASE,
) -> None:
    """Push a folder to the Hub with a filled model card; checks it before anything is sent.

    Example: `hf-attn push smollm2-moba me/SmolLM2-135M-moba --license apache-2.0`
    """
    with one_clear_line():
        facts = _facts(results, metric, trained, data, lengths, license, base_model)
        address = hf_attn.push(folder, repo, private=private, **facts)
    console.print(f"pushed {folder} to {address}", highlight=False, soft_wrap=True)


def _facts(results: Path | None, metrics: list[str], *strings: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(results.read_text()) if results is not None else {}
    names = ("trained", "data", "lengths", "license", "base_model")
    facts.update({name: value for name, value in zip(names, strings, strict=True) if value is not None})
    if metrics:
        facts["metrics"] = {**facts.get("metrics", {}), **dict(map(_metric, metrics))}
    return facts


def _metric(text: str) -> tuple[str, dict[str, float]]:
    name, equals, values = text.rpartition("=")
    cells = values.split(",")
    try:
        row = {key: float(cell) for key, cell in zip(("dense", "before", "after"), cells, strict=False) if cell.strip()}
    except ValueError:
        row = {}
    if not equals or not row or len(cells) > 3:
        raise ValueError(f"--metric is NAME=DENSE,BEFORE,AFTER, got {text!r}; example: 'held-out loss=2.68,3.06,2.99'")
    return name, row
