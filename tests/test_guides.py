"""The code of the guide pages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoModelForCausalLM

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def test_write_your_own(tiny_model):
    parts = blocks("write_your_own.md")
    assert len(parts) == 3
    namespace = {"model": AutoModelForCausalLM.from_pretrained(tiny_model).eval()}
    for number, code in enumerate(parts):
        exec(compile(code, f"write_your_own.md, block {number}", "exec"), namespace)
