"""The README's snippets run, in order, as a new user would paste them; the example runs too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_attn
from hf_attn.models import pushing
from tests.integrations.diffusers.tiny import build

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SMALL_VIDEO = '"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2'


def test_snippets(tiny_model, tmp_path, monkeypatch):
    """All Python blocks in one namespace; Hub ids become local folders, the video a small one, the upload is noted."""
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda model, repo, **options: pushed.append(repo))
    monkeypatch.setattr(pushing, "push_card", lambda save, repo, options: pushed.append(f"card of {repo}"))
    build("wan").target.save_pretrained(tmp_path / "wan")
    small = {
        REPO: tiny_model,
        WAN: str(tmp_path / "wan"),
        '"height": 480, "width": 832, "num_frames": 81': SMALL_VIDEO,
    }
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 3
    namespace = {}
    for number, snippet in enumerate(snippets):
        for original, replacement in small.items():
            assert sum(original in text for text in snippets) == 1, original
            snippet = snippet.replace(original, replacement)
        exec(compile(snippet, f"README snippet {number}", "exec"), namespace)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    assert again.config._attn_implementation == "hf_attn_streaming"
    assert (tmp_path / "psa.png").is_file() and len(namespace["frames"]) == 9
    assert type(namespace["moba"]).__name__ == "MobaLlamaForCausalLM"
    assert pushed == ["card of me/SmolLM2-135M-moba", "me/SmolLM2-135M-moba"]


def test_every_mechanism_is_in_the_table_and_has_a_page():
    for row in hf_attn.list_mechanisms():
        assert f"`hf_attn_{row['name']}`" in README
        assert (ROOT / "docs" / f"{row['name']}.md").is_file()


def test_the_table_says_what_the_mechanisms_say():
    columns = ("train", "decode", "padding", "packing", "cpu", "triton", "diffusers")
    for row in hf_attn.list_mechanisms():
        line = next(line for line in README.splitlines() if line.startswith(f"| [`hf_attn_{row['name']}`]"))
        cells = [cell.strip() for cell in line.strip("|").split("|")][2:9]
        for column, cell in zip(columns, cells, strict=True):
            # MoH is not a mechanism for diffusers: its DiT is a model of its own.
            if (row["name"], column) != ("moh", "diffusers"):
                assert (cell != "-") == row["capabilities"][column], (row["name"], column, cell)


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


def test_moh_example(tiny_model, tmp_path):
    command = [sys.executable, str(ROOT / "examples/moh_generate.py"), "--model", tiny_model, "--output", "moh"]
    done = subprocess.run(
        [*command, "--shared-heads", "1", "--top-k", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "50 % of the heads a token" in done.stdout and "MoHLlamaForCausalLM" in done.stdout


@pytest.mark.parametrize("folder, files", [("examples", "*.py"), ("recipes", "*/train.py")])
def test_every_script_is_run_by_a_test(folder, files):
    """By name: what no test mentions is what a user would be the first to run."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for script in (ROOT / folder).glob(files):
        name = script.parent.name if folder == "recipes" else script.stem
        assert re.search(rf"\b{name}\b", tests), f"no test runs {script.relative_to(ROOT)}"
