"""The wheel and the source distribution: what is in them, and that the wheel works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KERNEL = ROOT / "kernels" / "hfattn-sparse" / "torch-ext" / "hfattn_sparse"

USE = """
import pathlib, torch
import hf_attn
from hf_attn import ops
import hf_attn.ops.hfattn_sparse as kernel
assert pathlib.Path(kernel.__file__).is_relative_to({where!r}), kernel.__file__
q = torch.randn(1, 2, 300, 16)
routes = ops.select_routes(q, q, block_size=16, top_k=2)
out = ops.routed_block_attention(q, q, q, routes, block_size=16)
print(tuple(out.shape), [row["name"] for row in hf_attn.list_mechanisms()])
"""


def build(kind: str, folder: Path) -> Path:
    """Built from this tree without build isolation: nothing is downloaded."""
    pytest.importorskip("hatchling")
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """Scripts folder of a new environment: the wheel installed by pip, its dependencies seen through a .pth file."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return scripts


def run_fresh(command: list[str], cwd: Path) -> str:
    """Output of a command that sees nothing of the source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def use_from(where: Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", USE.format(where=str(where))],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(where)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def data_files(folder: Path) -> list[Path]:
    """Files of the source tree that are not code."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    return [path for path in found if not any(part.startswith(("__pycache__", ".")) for part in path.parts)]


def test_wheel_holds_the_kernels_and_nothing_foreign(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "hf_attn/__init__.py",
        "hf_attn/ops/hfattn_sparse/__init__.py",
        "hf_attn/ops/hfattn_sparse/block_sparse/torch_path.py",
        "hf_attn/ops/hfattn_sparse/launch_table.json",
        "hf_attn/ops/hfattn_sparse/native/tiles.cpp",
        "hf_attn/ops/hfattn_sparse/routed/reference.py",
        "hf_attn/mechanisms/moba.py",
        "hf_attn/py.typed",
        # Whatever is data (tables, results) comes along; what git ignores does not.
        *(f"hf_attn/{path.relative_to(ROOT / 'hf_attn')}" for path in data_files(ROOT / "hf_attn")),
        *(f"hf_attn/ops/hfattn_sparse/{path.relative_to(KERNEL)}" for path in data_files(KERNEL)),
        *(f"hf_attn/integrations/hub/templates/{card.name}" for card in (ROOT / "model_cards").glob("*.md")),
    ):
        assert needed in names
    top = {name.split("/")[0] for name in names}
    assert all(name == "hf_attn" or name.endswith(".dist-info") for name in top), top
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_alone(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    mechanisms = sorted(f.stem for f in (ROOT / "hf_attn" / "mechanisms").glob("*.py") if not f.name.startswith("_"))
    assert f"(1, 2, 300, 16) {mechanisms}" in use_from(site, tmp_path)


def test_wheel_works_inside_the_source_tree(wheel, tmp_path):
    """A script started in the repository root with the wheel installed: package and kernels come from one place."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = tmp_path / "script.py"
    script.write_text(USE.format(where=str(site)))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_source_tree_works(tmp_path):
    """PYTHONPATH=root, from elsewhere, nothing installed from it."""
    assert "(1, 2, 300, 16)" in use_from(ROOT, tmp_path)


def test_metadata(wheel):
    """What an index shows: version, licence, floors without upper pins, extras, the command."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    facts = Parser().parsestr(archive.read(name).decode())
    assert facts["Version"] == PROJECT["version"] and wheel.name == f"hf_attn-{PROJECT['version']}-py3-none-any.whl"
    assert facts["License-Expression"] == "Apache-2.0" and facts["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in facts.get_all("Classifier") and facts.get_payload().startswith("# hf-attn")
    needs = facts.get_all("Requires-Dist")
    assert not any("<" in need.split(";")[0] for need in needs), needs
    assert set(facts.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "hf-attn = hf_attn.cli:main" in scripts


def test_the_version_is_in_the_changelog():
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_builds_the_wheel(tmp_path):
    """Everything that the wheel, the tests, the docs and the recipes are made of is in it, and nothing else."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("hf_attn", "kernels", "model_cards", "tests", "docs", "recipes", "examples")
    files = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "pyproject.toml"}
    assert files <= names and "kernels/.hf_attn_kernels" in names
    assert {name.split("/")[0] for name in names} <= {*folders, *files, "PKG-INFO", ".gitignore", ".ci"}
    for folder in folders:
        kinds = (".py", ".md", ".yaml", ".json", ".cpp", ".h")
        wanted = [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
        assert {str(path.relative_to(ROOT)) for path in wanted} <= names, folder


MODEL = """
import pathlib, sys, torch, hf_attn
from transformers import AutoModelForCausalLM
assert pathlib.Path(hf_attn.__file__).is_relative_to(sys.prefix), hf_attn.__file__
assert (pathlib.Path(hf_attn.__file__).parent / "py.typed").is_file()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="hf_attn_moba", hf_attn={"top_k": 2})
hf_attn.apply(model, "moba", block_size=16, top_k=2, min_seq_len=0)
out = model.generate(torch.arange(64)[None], attention_mask=torch.ones(1, 64), max_new_tokens=3, do_sample=False)
moba = hf_attn.convert(model, "moba", kconv_width=3, block_size=16, top_k=2)
moba.save_pretrained("converted")
print(out.shape, hf_attn.stats(model)["totals"]["sparse_calls"], hf_attn.__version__)
"""


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(fresh, tmp_path, tiny_model):
    """Installed without extras, used from elsewhere: the command, a model with a mechanism, a conversion."""
    assert "doctor" in run_fresh([str(fresh / "hf-attn"), "--help"], tmp_path)
    assert run_fresh([str(fresh / "hf-attn"), "--version"], tmp_path).strip() == PROJECT["version"]
    script = tmp_path / "model.py"
    script.write_text(MODEL)
    out = run_fresh([str(fresh / "python"), str(script), tiny_model], tmp_path)
    assert out.split("\n")[-2].startswith("torch.Size([1, 67]) 2 ") and out.strip().endswith(PROJECT["version"])
    assert (tmp_path / "converted" / "config.json").is_file()
