"""DoctorReport: what `hf_attn.doctor` found, for every host."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DoctorReport:
    """What `doctor` found. Print it; `ok` is True when `problems` is empty.

    `plotted_layer` is the number of the layer in the picture, when one was drawn.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    plotted_layer: int | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.problems)} problem(s)"
        problems = [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([f"hf_attn doctor: {verdict}", *problems, *(f"  {line}" for line in self.lines)])
