"""`hf-attn bench`: speeds that are ratios within one run, with bytes, density and quality beside them."""

from __future__ import annotations

import copy
import csv
import platform
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.utils import logging as hf_logging

import hf_attn
from hf_attn.analysis.head_classes import HeadCalibration
from hf_attn.analysis.head_files import load_heads
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench import decode as decoding
from hf_attn.bench import prefill_speed
from hf_attn.bench.models import load_language_model, random_layers
from hf_attn.bench.serving_speed import LSERVE
from hf_attn.bench.timing import machine_load
from hf_attn.cli.bench_bars import bars
from hf_attn.cli.bench_common import ListOptions
from hf_attn.cli.bench_levels import mask, op, peer
from hf_attn.cli.bench_model import model
from hf_attn.cli.bench_report import report
from hf_attn.cli.common import NumberLists, console, one_clear_line, parse_integers, parse_options, progress_line
from hf_attn.cli.decode_tables import decode_notes, decode_table, head_options, prefill_table

bench = typer.Typer(no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure speed against dense attention in the same run.

    Example: `hf-attn bench op block_sparse_attention --lengths 4096 8192`

    Example: `hf-attn bench decode --lengths 2048 4096 8192`
    """


bench.command("op", cls=ListOptions)(op)
bench.command("mask", cls=ListOptions)(mask)
bench.command("peer", cls=ListOptions)(peer)
bench.command("model", cls=ListOptions)(model)
bench.command("report")(report)
bench.command("bars", cls=ListOptions)(bars)


@bench.command("decode", cls=NumberLists)
def decode(
    model_name: str = typer.Argument(None, metavar="[MODEL]", help="Hub id, folder or .gguf; default SmolLM2-135M."),
    lengths: str = typer.Option("2048 4096 8192", metavar="N N ...", help="Tokens of context where the steps end."),
    mechanism: str = typer.Option("lserve", help="A mechanism with a cache of its own."),
    option: list[str] = typer.Option([], "--option", "-o", help="NAME=VALUE of the mechanism; may be repeated."),
    heads: Path = typer.Option(None, help="Head classes: a file or folder of hf-attn calibrate; default: measure now."),
    layers: int = typer.Option(None, min=1, help="Random-weight layers for lengths the model cannot reach."),
    repeats: int = typer.Option(7, min=7, help="Counted rounds of steps; the median counts."),
    prefill_repeats: int = typer.Option(3, min=0, help="Counted prefills of every length; 0 leaves that table out."),
    group_max: bool = typer.Option(False, "--group-max", help="Also one list of pages for all heads of a KV head."),
    threads: int = typer.Option(2, min=1, help="CPU threads."),
    output: Path = typer.Option(None, "--csv", help="Append all figures to this file."),
) -> None:
    """Time decoding over a long context: dense over two caches, the mechanism, and its KV8 and KV4 caches.

    Tokens are a real text, so the table shows what speed costs in perplexity. Every variant is checked first; one that
    fails has no speed. For lengths beyond the model the layers and what they attend to are random, and only speed is
    stated.

    Example: `hf-attn bench decode --lengths 2048 4096 8192 -o token_budget=1024 --csv decode.csv`

    Example: `hf-attn bench decode --lengths 32768 --layers 4 -o token_budget=4096`
    """
    with one_clear_line():
        sizes = parse_integers("--lengths", lengths, 256)
        options = {**LSERVE, **parse_options(option)}
        table = decoding.variants(mechanism, options, group_max)
        interval = max(hf_attn.LServeConfig.from_dict(v.options).reuse_interval for v in table if v.options)
        room = decoding.steps_needed(repeats, interval)[1]
        if sizes[0] <= room:
            raise ValueError(f"--lengths must be more than {room} tokens for the steps, got {sizes[0]}")
        given = None if heads is None else load_heads(heads)
        torch.set_num_threads(threads)
        hf_logging.disable_progress_bar()
        model, tokenizer = load_language_model(model_name)
        limit = model.config.max_position_embeddings
        near, far = [n for n in sizes if n <= limit], [n for n in sizes if n > limit]
        if far and layers is None:
            raise ValueError(
                f"--lengths asks for {far[0]} tokens, but this model ends at {limit}; pass --layers N to time N layers "
                "with random weights there"
            )
        console.print(f"{_setting()}; {machine_load()}", highlight=False)
        if near:
            _run(model, tokenizer, near, mechanism, options, given, repeats, prefill_repeats, group_max, output)
        if far:
            config = copy.deepcopy(model.config)
            del model
            random = random_layers(config, layers, max(far))
            console.print(
                f"[bold]{layers} layers with random weights[/bold] of {config.model_type}'s shape, random keys in the "
                "caches, random head classes: speed only"
            )
            _run(random, tokenizer, far, mechanism, options, None, repeats, prefill_repeats, group_max, output, True)
        console.print(machine_load(), highlight=False)


def _setting() -> str:
    return f"torch {torch.__version__}, fp32, {torch.get_num_threads()} thread(s), {platform.machine()}"


def _run(
    model: Any,
    tokenizer: Any,
    lengths: list[int],
    mechanism: str,
    options: dict[str, Any],
    given: HeadCalibration | None,
    repeats: int,
    prefill_repeats: int,
    group_max: bool,
    output: Path | None,
    random: bool = False,
) -> None:
    """Both tables of one model."""
    if "heads" not in options and "gates" not in options:
        sparsity = options.get("static_sparsity", hf_attn.LServeConfig.static_sparsity)
        if random:
            generator = torch.Generator().manual_seed(0)
            shape = model.config.num_hidden_layers, model.config.num_key_value_heads
            options = {**options, "static_sparsity": sparsity, "gates": torch.rand(shape, generator=generator).tolist()}
        else:
            options = {**head_options(model, tokenizer, given, sparsity), **options}
    text = [python_reference_text()]
    text *= -(-max(lengths) * 8 // len(text[0])) if random else 1
    ids = token_windows(tokenizer, ["\n\n".join(text)], length=max(lengths) + 1, count=1)
    if prefill_repeats:
        with progress_line("prefill") as progress:
            found = prefill_speed.measure(
                model, mechanism, options, ids, lengths, repeats=prefill_repeats, progress=progress
            )
        console.print(prefill_table(found))
        console.print(
            f"median of {prefill_repeats}, in turn. ceiling: Amdahl's law, were streaming heads "
            f"({found[1].streaming:.0%} of all) free: 1 / (1 - attention's share of dense x share of streaming heads). "
            f"checked on {min(prefill_speed.CHECKED_TOKENS, max(lengths))} tokens: error {found[1].error:.1e}",
            highlight=False,
        )
        _append(
            output, [_prefill_record(row, dense) for dense in found[::2] for row in found if row.length == dense.length]
        )
    table = decoding.variants(mechanism, options, group_max)
    prompts = (
        decoding.RandomPrompts(model.config) if random else decoding.Prompts(model, mechanism, table[2].options, ids)
    )
    with progress_line("decode") as progress:
        rows = decoding.measure(model, mechanism, table, ids, prompts, lengths, repeats=repeats, progress=progress)
    console.print(decode_table(rows, text=not random))
    for note in decode_notes(rows, table[2].options):
        console.print(note, highlight=False)
    _append(output, [_decode_record(row, rows, random) for row in rows])


def _decode_record(row: decoding.Row, rows: list[decoding.Row], random: bool) -> dict[str, Any]:
    host, own = (next(r for r in rows if r.length == row.length and r.name == n) for n in (decoding.HOST, decoding.OWN))
    speeds = row.passed and host.passed
    return {
        "table": "decode", "length": row.length, "variant": row.name, "random_weights": random, "error": row.error,
        "seconds": row.timing.median / row.steps if row.passed else "", "spread": row.timing.spread,
        "over_dynamic_cache": row.speedup(host) if speeds else "",
        "over_own_dense": row.speedup(own) if speeds and own.passed else "",
        "bytes_read": row.bytes_read, "bytes_held": row.bytes_held, "density": row.density,
        "pages_read": row.pages_read, "pages_held": row.pages_held, "selector_share": row.selector_share,
        "perplexity_ratio": "" if random else row.perplexity_ratio(host), "steps": len(row.losses),
    }  # fmt: skip


def _prefill_record(row: prefill_speed.PrefillRow, dense: prefill_speed.PrefillRow) -> dict[str, Any]:
    return {
        "table": "prefill", "length": row.length, "variant": row.name, "error": row.error,
        "seconds": row.timing.median if row.passed else "", "spread": row.timing.spread,
        "over_dense": row.speedup(dense) if row.passed else "",
        "attention_over_dense": row.attention_speedup(dense) if row.passed else "",
        "attention_share": row.attention_share, "ceiling": row.ceiling(dense), "density": row.density,
    }  # fmt: skip


_COLUMNS = (
    "table", "length", "variant", "seconds", "spread", "over_dynamic_cache", "over_own_dense", "over_dense",
    "attention_over_dense", "attention_share", "ceiling", "bytes_read", "bytes_held", "density", "pages_read",
    "pages_held", "selector_share", "perplexity_ratio", "steps", "error", "random_weights", "setting", "load",
)  # fmt: skip


def _append(file: Path | None, records: list[dict[str, Any]]) -> None:
    """Rows behind those the file has, keyed by machine and load."""
    if file is None:
        return
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows({**record, "setting": _setting(), "load": machine_load()} for record in records)
