"""The README's snippets run, in order, as a new user would paste them; the example runs too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_attn

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_snippets(tiny_model, tmp_path, monkeypatch):
    """All Python blocks in one namespace; the Hub id becomes a local folder."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 4 and REPO in snippets[0]
    namespace = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet.replace(REPO, tiny_model), f"README snippet {number}", "exec"), namespace)
    assert (tmp_path / "my-model" / "config.json").is_file()


def test_every_mechanism_is_in_the_table_and_has_a_page():
    for row in hf_attn.list_mechanisms():
        assert f"`hf_attn_{row['name']}`" in README
        assert (ROOT / "docs" / f"{row['name']}.md").is_file()


def test_every_public_name_is_documented():
    pages = README + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name in hf_attn.__all__:
        assert re.search(rf"\b{name}\b", pages), f"{name} appears in no page"
        assert getattr(hf_attn, name).__doc__, f"{name} has no docstring"


def test_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("mechanism", ["moba", "streaming"])
def test_example(tiny_model, mechanism):
    command = [sys.executable, "examples/long_context.py", "--model", tiny_model, "--tokens", "1200"]
    done = subprocess.run(
        [*command, "--mechanism", mechanism],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ATTN_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stderr
    assert "layer 1: " in done.stdout and "sparse calls at density" in done.stdout


def test_key_convolution_example(tiny_model, tmp_path):
    command = [sys.executable, str(ROOT / "examples/moba_key_convolution.py"), "--model", tiny_model]
    done = subprocess.run(
        [*command, "--tokens", "300"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "by the new weights: 0.0e+00" in done.stdout and "MobaLlamaForCausalLM" in done.stdout
    losses = [float(value) for value in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert losses[2] < losses[0]
