"""`hf-attn bench model`."""

from __future__ import annotations

from pathlib import Path

import typer
from transformers.utils import logging as hf_logging

from hf_attn.bench.model_level import PASSES, VIDEO, model_rows
from hf_attn.bench.record import Store
from hf_attn.cli import bench_common as common
from hf_attn.cli.common import one_clear_line, parse_options


def model(
    name: str = typer.Argument(
        None,
        metavar="[MODEL]",
        help="Hub id, folder or .gguf of a causal language model (default SmolLM2-135M), or "
        "wan, small: video transformers of diffusers with random weights.",
    ),
    mechanism: str = typer.Option("moba", help="The mechanism to compare with the model's own attention."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE of the mechanism; may be repeated."),
    lengths: str = typer.Option("2048", metavar="N N ...", help="Tokens of the prompt; of a video, of the latents."),
    passes: str = typer.Option("prefill decode", "--passes", metavar="NAME ...", help="prefill, decode, train."),
    dtype: str = common.DTYPE,
    device: str = common.DEVICE,
    threads: int = common.THREADS,
    repeats: int = common.REPEATS,
    output: Path = common.RESULTS,
    again: bool = common.AGAIN,
    run: str = common.RUN,
    report: Path = common.REPORT,
) -> None:
    """Time a whole model with a mechanism against the same weights without it: prefill, decoding, a training step.

    Hidden states are first compared with those of the reference path; where they differ there is no speed.

    Example: `hf-attn bench model --mechanism moba -o block_size=128 -o top_k=8 --lengths 4096 --dtype fp32`

    Example: `hf-attn bench model small --mechanism vmoba -o density=0.2 --lengths 8192 --dtype fp32`
    """  # fmt: skip
    with one_clear_line():
        store = Store(output, again=again)
        options = parse_options(option)
        plan = common.make_plan(
            lengths=lengths, density="1", dtype=dtype or ("fp32" if name in VIDEO else ""), passes="forward", path="",
            device=device or ("cpu" if name in VIDEO else ""), heads=None, kv_heads=None, head_dim=None, block=128,
            threads=threads, repeats=repeats, graphs=False, run=run,
        )  # fmt: skip
        kinds = common.words_of("--passes", passes, PASSES)
        hf_logging.disable_progress_bar()
        common.carry_out(
            "model", plan, store, lambda step: model_rows(name, mechanism, options, plan, kinds, store, step), report
        )
