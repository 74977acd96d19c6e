"""`hf-attn demo`: a real language model answers from a long text, dense and with our mechanisms, then decodes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as hf_logging

import hf_attn
from hf_attn.analysis.texts import python_reference_text, token_windows
from hf_attn.bench import decode as decoding
from hf_attn.bench.long_text import QUESTION, prompt_of_length
from hf_attn.bench.models import load_language_model
from hf_attn.bench.prefill import greedy_answer, prefill, run_body
from hf_attn.bench.serving_speed import LSERVE
from hf_attn.bench.timing import machine_load
from hf_attn.cli.common import console, one_clear_line, parse_integers, progress_line
from hf_attn.cli.decode_tables import decode_notes, decode_table, head_options

STREAMING = {"num_sinks": 4, "window": 896, "block_size": 128}
# min_seq_len=0: the table shows what the mechanism does, also at lengths where it would rather stay dense.
MOBA: dict[str, Any] = {"block_size": 128, "top_k": 8, "decode": "full", "min_seq_len": 0}
MECHANISMS: dict[str, dict[str, Any] | None] = {"sdpa": None, "hf_attn_streaming": STREAMING, "hf_attn_moba": MOBA}
NOISY = 0.20
# Rounds of the decode table, and tokens that tell which heads stream: few, so that the demo stays short.
DECODE_ROUNDS, CALIBRATION_TOKENS = 4, 2048

_RELOAD = """
import json, sys
import torch
import hf_attn
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([json.loads(sys.stdin.read())])
answer = model.generate(ids, max_new_tokens=int(sys.argv[2]), do_sample=False, pad_token_id=0)
tokens = answer[0, ids.shape[1]:].tolist()
layers = hf_attn.stats(model)["layers"]
print(json.dumps({"tokens": tokens, "implementation": model.config._attn_implementation,
                  "called": sum(layer["calls"] > 0 for layer in layers.values()),
                  "layers": model.config.num_hidden_layers}))
"""


@dataclass
class Row:
    """One line of the table."""

    length: int
    name: str
    seconds: list[float] = field(default_factory=list)
    density: float = 1.0
    perplexity: float = 0.0
    mass: float = 1.0
    answer: str = ""

    @property
    def noisy(self) -> bool:
        return max(self.seconds) / min(self.seconds) - 1 > NOISY


def demo(
    model_name: str | None = typer.Option(None, "--model", help="Hub id, folder or .gguf; default SmolLM2-135M."),
    lengths: str = typer.Option("2048,4096,8192", help="Tokens of text + question + answer, comma-separated."),
    answer_tokens: int = typer.Option(40, min=1, help="Longest answer."),
    repeats: int = typer.Option(2, min=2, help="Timed prefills of each length and mechanism."),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0 leaves torch's choice."),
    output: Path = typer.Option(Path("demo_output"), help="Folder for the picture, the saved model and the figures."),
) -> None:
    """Let a real language model answer from a long text: dense, streaming and MoBA in one table, LServe's decoding in
    another.

    Example: `hf-attn demo --lengths 2048,4096`
    """
    with one_clear_line():
        sizes = parse_integers("--lengths", lengths, 256)
        if threads:
            torch.set_num_threads(threads)
        output.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load(model_name, max(sizes))
        rows = measure(model, tokenizer, sizes, answer_tokens, repeats)
        console.print(results_table(rows))
        print_notes(rows)
        steps = decode(model, tokenizer, sizes)
        picture_and_reload(model, tokenizer, sizes, answer_tokens, output)
        for name, table in (("table", rows), ("decode", steps)):
            (output / f"{name}.json").write_text(json.dumps([vars(row) for row in table], indent=1) + "\n")


def load(name: str | None, longest: int) -> tuple[Any, Any]:
    """The model, checked against the lengths asked for."""
    console.print(f"loading {name or 'SmolLM2-135M-Instruct'} ...")
    hf_logging.disable_progress_bar()
    model, tokenizer = load_language_model(name)
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"--lengths asks for {longest} tokens, but this model ends at {limit}")
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32; {machine_load()}")
    return model, tokenizer


def measure(model: Any, tokenizer: Any, sizes: list[int], answer_tokens: int, repeats: int) -> list[Row]:
    """All rows; the repeats of one length take turns, so that a machine that drifts slows all mechanisms alike."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as progress:
        work = progress.add_task("prefill", total=sum(cost(n) for n in sizes) * len(MECHANISMS) * repeats)
        run_body(model, prompt_of_length(tokenizer, 256, 1))  # the first pass of a process is slower than any other
        for length in sizes:
            ids = prompt_of_length(tokenizer, length, answer_tokens)
            batch = [Row(length, name) for name in MECHANISMS]
            for turn in range(repeats):
                for row in batch:
                    what = f"{length} tokens, {row.name} ({turn + 1}/{repeats})"
                    progress.update(work, description=what)
                    if not console.is_terminal:
                        left = progress.tasks[work].time_remaining
                        console.print(what if left is None else f"{what}, about {left:.0f} s left")
                    one_turn(model, tokenizer, ids, row, answer_tokens, first=turn == 0)
                    progress.advance(work, cost(length))
            rows += batch
    return rows


def cost(length: int) -> float:
    """Relative cost of a prefill: a linear and a quadratic part, equal near 6k tokens for SmolLM2."""
    return length * (1 + length / 6000)


def one_turn(model: Any, tokenizer: Any, ids: torch.Tensor, row: Row, answer_tokens: int, first: bool) -> None:
    """One prefill; the first also gives perplexity, mass and the answer."""
    switch(model, row.name)
    if not first:
        row.seconds.append(run_body(model, ids)[2])
        return
    result = prefill(model, ids)
    row.seconds.append(result.seconds)
    row.perplexity = result.perplexity
    if row.name != "sdpa":
        assert result.mass is not None  # a mechanism was called
        row.mass = result.mass
        row.density = hf_attn.stats(model)["totals"]["density"]
    row.answer = tokenizer.decode(greedy_answer(model, result, answer_tokens)).strip().replace("\n", " ")


def switch(model: Any, name: str) -> None:
    """Dense attention, or one of our mechanisms with the demo's options."""
    options = MECHANISMS[name]
    if options is None:
        hf_attn.remove(model)
    else:
        hf_attn.apply(model, name.removeprefix("hf_attn_"), **options)


def results_table(rows: list[Row]) -> Table:
    """The one table."""
    table = Table(title="one prefill, and a greedy answer from its cache", title_justify="left")
    for name in ("tokens", "attn_implementation", "prefill", "speed-up", "density", "perplexity", "mass", "answer"):
        table.add_column(name, justify="left" if name in ("attn_implementation", "answer") else "right")
    dense = {row.length: row for row in rows if row.name == "sdpa"}
    for row in rows:
        base = dense[row.length]
        ratio = "noisy" if row.noisy or base.noisy else f"{median(base.seconds) / median(row.seconds):.2f}x"
        table.add_row(
            str(row.length),
            row.name,
            f"{median(row.seconds):.2f} s",
            ratio,
            f"{row.density:.0%}",
            f"{row.perplexity:.2f}",
            f"{row.mass:.2f}",
            row.answer,
            end_section=row.name == list(MECHANISMS)[-1],
        )
    return table


def print_notes(rows: list[Row]) -> None:
    """What the table means, and what it does not."""
    console.print(f"question: {QUESTION}")
    console.print(
        "speed-up: dense prefill over this one, whole model, median of interleaved repeats. density: (query, key) "
        "pairs computed over causal pairs. mass: share of dense attention on the keys that are read (256 rows a layer)."
    )
    console.print(
        f"moba: block_size={MOBA['block_size']}, top_k={MOBA['top_k']}, decode={MOBA['decode']!r} (the tokens of the "
        f"answer attend to everything). streaming: {STREAMING['num_sinks']} sinks, window {STREAMING['window']}, "
        "decode too."
    )
    if any(row.noisy for row in rows):
        console.print(
            f"[yellow]noisy[/yellow]: repeats differed by more than {NOISY:.0%}, so no ratio is stated; run again on "
            f"an idle machine ({machine_load()})."
        )
    console.print(
        "[bold]This model was not trained with MoBA[/bold], so it loses quality with it (see perplexity). Train or "
        "tune with it, keep the last layers dense with layers={'-3:': None}, or raise top_k; docs/moba.md says how."
    )


def decode(model: Any, tokenizer: Any, sizes: list[int]) -> list[decoding.Row]:
    """The decode table: LServe's cache in three formats beside the dense one, behind one prefill of each kind."""
    hf_attn.remove(model)
    options = {**LSERVE, **head_options(model, tokenizer, None, 0.5, CALIBRATION_TOKENS)}
    table = [variant for variant in decoding.variants("lserve", options) if variant.name != decoding.OWN]
    ids = token_windows(tokenizer, [python_reference_text()], length=max(sizes) + 1, count=1)
    options = next(variant.options for variant in table if variant.options is not None)
    prompts = decoding.Prompts(model, "lserve", options, ids)
    with progress_line("decode") as progress:
        rows = decoding.measure(model, "lserve", table, ids, prompts, sizes, repeats=DECODE_ROUNDS, progress=progress)
    console.print(decode_table(rows, own=False))
    for note in decode_notes(rows, options):
        console.print(note, highlight=False)
    console.print("more lengths, models and baselines: hf-attn bench decode --help")
    return rows


def picture_and_reload(model: Any, tokenizer: Any, sizes: list[int], answer_tokens: int, output: Path) -> None:
    """Picture of the selection; save; a fresh process that only imports hf_attn must give the same tokens."""
    switch(model, "hf_attn_moba")
    picture = output / "selection.png"
    length = sizes[len(sizes) // 2]
    ids = prompt_of_length(tokenizer, length, answer_tokens)
    report = hf_attn.doctor(model, plot=picture, input_ids=ids, layer=model.config.num_hidden_layers // 2)
    console.print(f"wrote {picture}: blocks that layer {report.plotted_layer} selects at {length} tokens")
    folder = output / "model"
    ids = prompt_of_length(tokenizer, sizes[0], answer_tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        tokens = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(folder), "16", str(torch.get_num_threads())],
        input=json.dumps(ids[0].tolist()),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if process.returncode:
        raise RuntimeError(f"the saved model did not reload: {process.stderr.strip().splitlines()[-1]}")
    fresh = json.loads(process.stdout.splitlines()[-1])
    if fresh["tokens"] != tokens or fresh["called"] != fresh["layers"]:
        raise RuntimeError(f"the reloaded model differs: {fresh} instead of tokens {tokens}")
    console.print(
        f"wrote {folder}: a fresh process that only adds `import hf_attn` reloaded it as {fresh['implementation']} in "
        f"{time.perf_counter() - start:.0f} s, was called in {fresh['called']} of {fresh['layers']} layers, and gave "
        f"the same {len(tokens)} tokens."
    )
