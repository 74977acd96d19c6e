"""`hf-attn doctor MODEL`: is the mechanism really called, on which path, and what would be ignored?

With `--size`, MODEL is a diffusers pipeline: how much faster can it get at that size?
"""

from __future__ import annotations

from pathlib import Path

import typer

import hf_attn
from hf_attn.bench.models import load_language_model
from hf_attn.cli.common import console, one_clear_line, parse_options


def doctor(
    model_name: str = typer.Argument(None, metavar="[MODEL]", help="Hub id, folder or .gguf; default SmolLM2-135M."),
    mechanism: str = typer.Option(None, "--mechanism", "-m", help="Apply this mechanism first, e.g. moba."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE of the mechanism; may be repeated."),
    length: int = typer.Option(4096, min=1, help="Prompt length for the predicted density."),
    plot: Path = typer.Option(None, help="Write the selection picture (PNG) here."),
    size: str = typer.Option(None, help="For diffusers pipelines: HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES in pixels."),
) -> None:
    """Check one model: run a tiny forward pass, count the calls, say what would be ignored.

    Example: `hf-attn doctor HuggingFaceTB/SmolLM2-135M-Instruct -m moba -o top_k=8 --plot out.png`

    With --size, say how much faster a diffusers pipeline can get; only its configurations are read:
    `hf-attn doctor Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 480x832x81`
    """
    with one_clear_line():
        options = parse_options(option)
        if options and mechanism is None:
            raise ValueError("--option needs --mechanism")
        if mechanism is not None:
            # Before the weights are loaded: a typing error should not cost a minute.
            hf_attn.spec(mechanism, **options)
        if size is not None:
            report = hf_attn.doctor(_pipeline(model_name), mechanism=mechanism, **_pixels(size), **options)
            console.print(str(report), highlight=False, markup=False)
            return
        model, tokenizer = load_language_model(model_name)
        if mechanism is not None:
            hf_attn.apply(model, mechanism, **options)
        ids = None
        if plot is not None:
            from hf_attn.bench.long_text import prompt_of_length

            limit = getattr(model.config, "max_position_embeddings", length)
            ids = prompt_of_length(tokenizer, min(length, limit), 1)
        report = hf_attn.doctor(model, seq_len=length, plot=plot, input_ids=ids)
        console.print(str(report), highlight=False, markup=False)
        if plot is not None:
            console.print(f"wrote {plot}")
    if not report.ok:
        raise typer.Exit(1)


def _pipeline(name: str | None) -> str:
    if name is None:
        raise ValueError("--size needs a diffusers pipeline, e.g. black-forest-labs/FLUX.1-dev --size 1024x1024")
    return name


def _pixels(size: str) -> dict[str, int]:
    """ "480x832x81" as height, width and num_frames."""
    parts = size.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--size is HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, e.g. 480x832x81, got {size!r}")
    return dict(zip(("height", "width", "num_frames"), map(int, parts), strict=False))
