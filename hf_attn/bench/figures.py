"""What benchmark modules hand back, and how another process gets it.

A module of `hf_attn.bench` that a speed bar names has `FIGURES`, the names of its numbers, and `main(argv)`, which
prints its table and returns a `Row` for every line of it. `collect` runs one in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """The figures of one case.

    Args:
        case: what was measured; unique in a run of the module.
        line: its line in the table of the module.
        figures: name -> number; the names are of the module's `FIGURES`.
        spread: of the rounds that the figures are ratios to (dense attention, a peer); None where it was not kept.
        problem: why there is no figure, such as a failed check.
    """

    case: str
    line: str
    figures: dict[str, float] = field(default_factory=dict)
    spread: float | None = None
    problem: str = ""


def show(row: Row) -> Row:
    """Print the line of a row and give the row back."""
    print(row.line, flush=True)
    return row


def collect(module: str, arguments: Sequence[str], *, timeout: float) -> list[Row]:
    """Rows of `python -m hf_attn.bench.<module> <arguments>`, run in a process of its own.

    Raises RuntimeError with the last line of what went wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        line = [sys.executable, "-m", "hf_attn.bench.figures", str(output), module, *arguments]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no result within {timeout:.0f} s") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the command failed: {last[:160]}")
        return [Row(**row) for row in json.loads(output.read_text())]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a module and write its rows as JSON: OUTPUT MODULE ARGUMENTS ..."""
    output, name, *arguments = sys.argv[1:] if argv is None else argv
    module = importlib.import_module(f"hf_attn.bench.{name}")
    rows = module.main(arguments)
    for row in rows:
        unknown = set(row.figures) - set(module.FIGURES)
        if unknown:
            raise ValueError(f"{name} gives figures {sorted(unknown)} that its FIGURES do not name")
    Path(output).write_text(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
