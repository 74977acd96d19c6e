"""`hf-attn convert REPO NAME --out DIR`: a checkpoint with the new weights of a system, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from transformers.utils import logging as hf_logging

from hf_attn.checks import refuse_existing, require_one_of
from hf_attn.cli.common import console, one_clear_line, parse_options, progress_line

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str = typer.Argument(..., metavar="REPO", help="Hub id or folder of a model with safetensors weights."),
    name: str = typer.Argument(..., help="The conversion, as for hf_attn.convert."),
    out: Path = typer.Option(None, "--out", help="New folder. Until complete it is called DIR.partial."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE of the conversion; repeatable."),
    dtype: str = typer.Option("auto", help="auto keeps each weight's; or float32, bfloat16, float16."),
    revision: str = typer.Option(None, help="Branch, tag or commit of a Hub id."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be done, and write nothing."),
    as_json: bool = typer.Option(False, "--json", help="With --dry-run: as JSON."),
) -> None:
    """Convert a checkpoint on disk. No model is held in memory, and an interrupted run goes on when started again.

    Example: `hf-attn convert HuggingFaceTB/SmolLM2-135M-Instruct moba --out smollm2-moba --option top_k=4`
    """
    with one_clear_line():
        require_one_of("--dtype", dtype, tuple(_DTYPES))
        if out is None and not dry_run:
            raise ValueError("--out is missing: the folder to write; or pass --dry-run")
        if out is not None:
            refuse_existing(out)
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        from hf_attn.models.streaming import FolderConversion

        options = parse_options(option)
        conversion = FolderConversion(source, name, dtype=_DTYPES[dtype], revision=revision, **options)
        plan = conversion.plan()
        if as_json and dry_run:
            print(json.dumps(plan.to_dict()))
        else:
            console.print(str(plan), highlight=False, markup=False, soft_wrap=True)
        if dry_run:
            return
        with progress_line("convert") as progress:
            conversion.run(out, progress)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
