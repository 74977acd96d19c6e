"""The wheel: what is in it, and that it works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from this tree without build isolation: nothing is downloaded."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


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


def test_wheel_holds_the_kernels_and_nothing_foreign(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "hf_attn/__init__.py",
        "hf_attn/ops/hfattn_sparse/__init__.py",
        "hf_attn/ops/hfattn_sparse/block_sparse/torch_path.py",
        "hf_attn/ops/hfattn_sparse/launch_table.json",
        "hf_attn/ops/hfattn_sparse/routed/reference.py",
        "hf_attn/mechanisms/moba.py",
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
