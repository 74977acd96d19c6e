"""Tables of decoding and prefill speed, as `hf-attn bench decode` and the demo print them."""

from __future__ import annotations

from typing import Any

from rich.table import Table

import hf_attn
from hf_attn.analysis.head_classes import HeadCalibration
from hf_attn.analysis.head_files import lserve_options
from hf_attn.bench import decode, prefill_speed
from hf_attn.bench.serving_speed import LSERVE
from hf_attn.cli.common import console, progress_line

MIB = 1 << 20


def decode_table(rows: list[decode.Row], own: bool = True, text: bool = True) -> Table:
    """Speed, bytes and perplexity of every variant; `own`: the cache run dense is a baseline too, `text`: the model
    knows language, so that perplexity means something."""
    table = Table(title="decoding, one token a step", title_justify="left")
    names = ["context", "", "tokens/s", f"over {decode.HOST}", *(["over own dense"] if own else [])]
    names += ["KV read/step", "KV held", "density", "pages", "selector", "perplexity", ""]
    for name in names:
        table.add_column(name, justify="right", overflow="fold")  # a narrow terminal must not cut digits off
    table.columns[1].justify = "left"
    for row in rows:
        host = _row(rows, row.length, decode.HOST)
        speed = f"{row.tokens_per_second:.2f}" if row.passed else "CHECK FAILED"
        bases = [host, _row(rows, row.length, decode.OWN)] if own else [host]
        ratios = [f"{row.speedup(base):.2f}x" if row.passed and base.passed else "-" for base in bases]
        pages = "-" if row.pages_read is None else f"{row.pages_read:.1f} of {row.pages_held}"
        share = row.selector_share
        table.add_row(
            str(row.length), row.name, speed, *ratios, f"{row.bytes_read / MIB:.1f} MiB",
            f"{row.bytes_held / MIB:.1f} MiB", f"{row.density:.1%}", pages, "-" if share is None else f"{share:.1%}",
            f"{row.perplexity_ratio(host):.3f}x" if text else "-", "noisy" if host.noisy else "",
            end_section=row is rows[-1] or rows[rows.index(row) + 1].length != row.length,
        )  # fmt: skip
    return table


def decode_notes(rows: list[decode.Row], options: dict[str, Any]) -> list[str]:
    """What the columns mean, and what went wrong."""
    steps = len(rows[0].losses)
    shown = {name: value for name, value in options.items() if name not in ("gates", "heads", "kv_scales")}
    notes = [
        "settings: " + ", ".join(f"{name}={value}" for name, value in shown.items()),
        f"median of {len(rows[0].rounds)} rounds of {rows[0].steps} steps, variants in turn, ratios within rounds; the "
        f"steps end at the context's length. perplexity: over dense, of the {steps} tokens of the steps (given text). "
        "KV read: the pages on every list (pages that heads share are copied once on a CPU), streaming heads, and "
        "statistics where the selector runs.",
    ]
    for row in rows:
        if not row.passed:
            notes.append(
                f"[red]CHECK FAILED[/red]: {row.name} at {row.length}: logits differ by {row.error:.1e} of their "
                f"largest magnitude (allowed {decode.TOLERANCE:.0e}); no speed is stated"
            )
        if row.name == decode.HOST and row.noisy:
            notes.append(
                f"[yellow]noisy[/yellow]: dense rounds at {row.length} spread by {row.timing.spread:.0%} (limit "
                f"{decode.NOISY:.0%}); run again on an idle machine"
            )
    return notes


def prefill_table(rows: list[prefill_speed.PrefillRow]) -> Table:
    """Prefill end to end and its attention calls alone, with what Amdahl's law allows."""
    table = Table(title="prefill", title_justify="left")
    for name in (
        "context", "", "prefill", "over dense", "ceiling", "attention", "over dense", "of prefill", "density", "",
    ):  # fmt: skip
        table.add_column(name, justify="right", overflow="fold")  # a narrow terminal must not cut digits off
    table.columns[1].justify = "left"
    for dense, row in zip(rows[::2], rows[1::2], strict=True):
        noisy = "noisy" if dense.timing.spread > decode.NOISY else ""
        for each in (dense, row):
            ratios = [
                f"{each.speedup(dense):.2f}x",
                f"{each.ceiling(dense):.2f}x",
                f"{each.attention_speedup(dense):.2f}x",
            ]
            if not each.passed:
                ratios = ["CHECK FAILED", "-", "-"]
            table.add_row(
                str(each.length), each.name, f"{each.timing.median:.2f} s", *ratios[:2],
                f"{each.attention_timing.median:.2f} s", ratios[2], f"{each.attention_share:.0%}",
                f"{each.density:.0%}", noisy, end_section=each is row,
            )  # fmt: skip
    return table


def head_options(
    model: Any, tokenizer: Any, given: HeadCalibration | None, sparsity: float, tokens: int = 8192
) -> dict[str, Any]:
    """Options of lserve that say which heads stream: from a file, else measured now, which is said."""
    if given is None:
        length = min(2048, tokens, model.config.max_position_embeddings)
        sizes = {"sink": LSERVE["ctx_sink"], "local": LSERVE["ctx_local"], "length": length, "tokens": tokens}
        with progress_line("calibrate") as progress:
            given = hf_attn.calibrate(model, "lserve", tokenizer=tokenizer, progress=progress, **sizes)
        console.print(f"head classes: measured now on {given.tokens} tokens (hf-attn calibrate keeps them in a folder)")
    return lserve_options(given, sparsity)


def _row(rows: list[decode.Row], length: int, name: str) -> decode.Row:
    return next(row for row in rows if row.length == length and row.name == name)
