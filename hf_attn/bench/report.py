"""A page of plots from files of results: speed-up and fraction of the limit against length, and where sparse wins."""

from __future__ import annotations

import html
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_attn.bench.bars import results_of
from hf_attn.bench.record import Row, read_rows

# What a line of a plot is made of, and what a plot is made of.
LINE = ("name", "variant", "dtype", "requested", "threads", "run", "git")
PLOT = ("hardware", "level", "pass", "shape_of_heads")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 } th, td { padding: .15rem .6rem; text-align: right }
th { border-bottom: 1px solid #888 } td.text, th.text { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } .scroll { overflow-x: auto }
"""


def require_matplotlib() -> Any:
    """The class Figure of matplotlib; raises ImportError with the install line when it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a report needs matplotlib: pip install "hf-attn[bench]"') from error
    return Figure


def write_report(files: Sequence[Path], output: Path) -> list[Path]:
    """Write the page `output` and its plots as PNG beside it; the page holds them itself, as SVG.

    Returns the files written. Raises ValueError for an output that is no .html file or results without a measured row.
    """
    figure_class = require_matplotlib()
    if output.suffix != ".html":
        raise ValueError(f"a report is an .html file, got {output}")
    rows = read_rows(files)
    drawn = (row for row in rows if row["level"] != "bar")
    measured = [row for row in drawn if row["status"] == "ok" and row["speedup"] is not None]
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, files))}; measure first: hf-attn bench op")
    output.parent.mkdir(parents=True, exist_ok=True)
    written, parts = [output], []
    for number, (title, lines) in enumerate(plots_of(measured).items(), 1):
        figure = draw(figure_class, title, lines)
        picture = output.with_name(f"{output.stem}-{number}.png")
        figure.savefig(picture, dpi=120)
        written.append(picture)
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
        svg = stream.getvalue()
        parts.append(f"<h2>{html.escape(title)}</h2><figure>{svg[svg.index('<svg') :]}</figure>{crossings(lines)}")
    output.write_text(page(parts, rows))
    return written


def plots_of(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Title of a plot -> name of a line -> its rows by length."""
    rows = [row | {"shape_of_heads": (row["shape"] or "").rpartition(" ")[0]} for row in rows]
    plots: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        plots[", ".join(str(row[name]) for name in PLOT if row[name])][line_of(row, rows)].append(row)
    return {
        title: {name: sorted(found, key=lambda r: float(r["length"])) for name, found in sorted(lines.items())}
        for title, lines in sorted(plots.items())
    }


def line_of(row: Row, rows: Sequence[Row]) -> str:
    """What tells a line from the others: fields that are the same everywhere are left out."""
    words = {"requested": "density {}", "threads": "{} threads"}
    differing = [name for name in LINE if name in ("name", "variant") or len({r[name] for r in rows}) > 1]
    return " ".join(words.get(name, "{}").format(row[name]) for name in differing if row[name])


def draw(figure_class: Any, title: str, lines: dict[str, list[Row]]) -> Any:
    """Speed-up and, where there is one, fraction of the limit against length; a line at 1 is dense attention."""
    entries = min(len(lines), 60)
    figure = figure_class(figsize=(11, 4.2 + 0.16 * math.ceil(entries / 3)), layout="constrained")
    limited = any(row["limit"] is not None for rows in lines.values() for row in rows)
    panels = figure.subplots(1, 2 if limited else 1, squeeze=False)[0]
    for name, rows in lines.items():
        at = [float(row["length"]) for row in rows]
        panels[0].plot(at, [row["speedup"] for row in rows], marker="o", markersize=3, label=name)
        if limited:
            # A line without a limit is drawn without points: the colours of both sides stay the same.
            bounded = [(float(row["length"]), row["limit"]) for row in rows if row["limit"] is not None]
            panels[1].plot(*(zip(*bounded, strict=True) if bounded else ([], [])), marker="o", markersize=3)
    for panel, what in zip(panels, ("speed-up over the best dense attention", "speed-up x density"), strict=False):
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.set_ylabel(what)
        panel.grid(True, which="both", linewidth=0.3)
    panels[0].set_yscale("log", base=2)
    figure.legend(*_first(panels[0], entries), loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def _first(panel: Any, count: int) -> tuple[list[Any], list[str]]:
    handles, labels = panel.get_legend_handles_labels()
    return handles[:count], labels[:count]


def crossover(rows: Sequence[Row]) -> float | None:
    """The length from which on a line stays above 1, between measured lengths on a logarithmic scale; None: never.

    The shortest measured length where the whole line lies above 1.
    """
    below = [i for i, row in enumerate(rows) if row["speedup"] < 1]
    if not below:
        return float(rows[0]["length"])
    if below[-1] == len(rows) - 1:
        return None
    first, second = rows[below[-1]], rows[below[-1] + 1]
    low, high = math.log(first["speedup"]), math.log(second["speedup"])
    start, end = (math.log(float(row["length"])) for row in (first, second))
    return math.exp(start + (end - start) * -low / (high - low))


def crossings(lines: dict[str, list[Row]]) -> str:
    """A table of crossover lengths."""
    cells = []
    for name, rows in lines.items():
        at = crossover(rows)
        best = max(row["speedup"] for row in rows)
        first, last = rows[0]["length"], rows[-1]["length"]
        if at is None:
            text = f"not up to {last}"
        else:
            text = f"below {first}" if at == float(first) else f"{at:.0f}"
        cells.append(f"<tr><td class=text>{html.escape(name)}</td><td>{text}</td><td>{best:.2f}</td></tr>")
    head = "<tr><th class=text>case</th><th>faster than dense from</th><th>best speed-up</th></tr>"
    return f"<table>{head}{''.join(cells)}</table>"


COLUMNS = (
    "level", "name", "variant", "dtype", "pass", "length", "density", "ms", "spread", "eager_ms", "dense", "dense_ms",
    "dense_spread", "speedup", "limit", "select_ms", "permute_ms", "build_ms", "over_peer", "peak_mib", "threads",
    "status",
)  # fmt: skip
_WORDS = ("level", "name", "variant", "dtype", "pass", "dense", "status")


def bar_table(rows: Sequence[Row]) -> str:
    """The speed bars among the rows, "" without one."""
    results = results_of(rows)
    if not results:
        return ""
    cells = []
    for result in results:
        bar, values = result.bar, " ".join(f"{value:.3g}" for value in result.values)
        asked = f"{'<=' if bar.most else '>='} {bar.bound:g}"
        texts = (bar.name, bar.what, asked, values, result.verdict, result.why, bar.line, result.hardware)
        cells.append("<tr>" + "".join(f"<td class=text>{html.escape(text)}</td>" for text in texts) + "</tr>")
    names = ("bar", "against", "asked", "measured", "result", "why", "command", "machine")
    head = "".join(f"<th class=text>{name}</th>" for name in names)
    return f"<h2>Speed bars</h2><div class=scroll><table><tr>{head}</tr>{''.join(cells)}</table></div>"


def page(parts: Sequence[str], rows: Sequence[Row]) -> str:
    """The whole page."""
    machines = sorted({f"{r['hardware']}: torch {r['torch']}, hf-attn {r['git'] or r['hf_attn']}" for r in rows})
    head = "".join(f"<th{' class=text' if name in _WORDS else ''}>{name}</th>" for name in COLUMNS)
    body = "".join(f"<tr>{''.join(_cell(name, row[name]) for name in COLUMNS)}</tr>" for row in rows)
    bars = bar_table(rows)
    empty = "" if parts or bars else "<p>No row has a speed to plot: see the column status.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>hf-attn bench</title>'
        f"<style>{STYLE}</style></head><body><h1>hf-attn bench</h1>"
        "<p>Speed-ups are medians of the ratios of interleaved rounds against the best dense attention of the same "
        "run. Speed-up x density is 1 for a kernel that pays nothing for being sparse. Rows whose check failed have no "
        "speed; rows with a restless dense run are left out of the plots.</p>"
        f"<ul>{''.join(f'<li>{html.escape(m)}</li>' for m in machines)}</ul>{empty}{bars}{''.join(parts)}"
        f"<h2>All rows</h2><div class=scroll><table><tr>{head}</tr>{body}</table></div></body></html>"
    )


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>"
    return f"<td{' class=text' if name in _WORDS else ''}>{html.escape('' if value is None else str(value))}</td>"
