"""The code of the guide pages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_attn.models import pushing

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def test_tour(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = blocks("tour.md")
    assert len(parts) == 3
    namespace = {}
    for number, code in enumerate(parts):
        code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model)
        exec(compile(code, f"tour.md, block {number}", "exec"), namespace)
    assert namespace["out"].shape == (1, 8, 512, 64)


def test_convert(tiny_model, tmp_path, monkeypatch):
    """The adapter is read from the folder it was saved to; the upload is noted."""
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda model, repo, **options: pushed.append(repo))
    monkeypatch.setattr(pushing, "push_card", lambda save, repo, options: None)
    parts = blocks("convert.md")
    assert len(parts) == 4
    namespace = {}
    for number, code in enumerate(parts):
        code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model)
        if number == 2:
            code = code.replace("me/my-adapter", "my-adapter")
        exec(compile(code, f"convert.md, block {number}", "exec"), namespace)
        if number == 2:
            # A PEFT model is uploaded by PEFT, which would ask a Hub; the merged one is a model of transformers.
            namespace["model"] = namespace["model"].merge_and_unload()
    assert (tmp_path / "my-adapter" / "hf_attn.json").is_file() and pushed == ["me/SmolLM2-135M-moba"]


def test_write_your_own(tiny_model):
    parts = blocks("write_your_own.md")
    assert len(parts) == 3
    namespace = {"model": AutoModelForCausalLM.from_pretrained(tiny_model).eval()}
    for number, code in enumerate(parts):
        exec(compile(code, f"write_your_own.md, block {number}", "exec"), namespace)
