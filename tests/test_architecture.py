"""The rules of the house: who may import whom, what an import costs, nothing shadows `kernels`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_attn"

# Room -> rooms of hf_attn it may import. `checks` imports nothing and serves everybody.
EVERYTHING = {
    "grid",
    "importing",
    "report",
    "call",
    "pattern",
    "ops",
    "caches",
    "mechanism",
    "mechanisms",
    "nn",
    "integrations",
    "models",
}
MAY_IMPORT = {
    "checks": set(),
    "grid": set(),
    "importing": set(),
    "report": set(),
    "call": {"grid"},
    "pattern": set(),
    "ops": {"pattern", "call"},
    "caches": {"ops"},
    "mechanism": {"call"},
    "mechanisms": {"grid", "ops", "pattern", "call", "mechanism", "caches"},
    "nn": {"ops"},
    "integrations": EVERYTHING - {"integrations", "models"},
    "models": EVERYTHING,
    "training": EVERYTHING,
    "analysis": EVERYTHING,
    "bench": EVERYTHING | {"analysis", "training"},
}
HOSTS = {"transformers", "diffusers", "peft", "accelerate", "huggingface_hub", "kernels", "typer", "rich"}
MAY_USE_HOSTS = {"integrations", "models", "training", "analysis", "bench", "cli", "front", "__init__"}


def imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hf_attn" and len(parts) > 1:
            target = parts[1]
            assert target != "cli" or room == "cli", f"{path} imports the command line"
            allowed = MAY_IMPORT.get(room)
            if allowed is not None and target != room:
                assert target in allowed | {"checks"}, f"{room} must not import hf_attn.{target}"
        if parts[0] in HOSTS:
            assert room in MAY_USE_HOSTS, f"{path} knows about {parts[0]}; that belongs into integrations/"


def test_integrations_do_not_import_each_other():
    for path in (PACKAGE / "integrations").rglob("*.py"):
        own = path.relative_to(PACKAGE / "integrations").parts[0]
        for name in imports(path):
            if name.startswith("hf_attn.integrations."):
                assert name.split(".")[2] == own, f"{path} imports {name}"


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in {"torch", "triton"} | sys.stdlib_module_names, f"{path} imports {name}"


def test_fast_paths_do_not_import_each_other():
    for path in (ROOT / "kernels").rglob("torch_path.py"):
        assert "triton_path" not in path.read_text()
    for path in (ROOT / "kernels").rglob("triton_path.py"):
        assert "torch_path" not in path.read_text()


def test_no_package_files_in_the_kernels_folder():
    """An __init__.py, a test or a conftest there would shadow the `kernels` distribution."""
    assert (ROOT / "kernels" / ".hf_attn_kernels").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [p for p in (ROOT / "kernels").rglob("*.py") if p.name == "conftest.py" or p.name.startswith("test_")]


def test_every_kernel_is_in_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for build in (ROOT / "kernels").glob("*/build.toml"):
        name = tomllib.loads(build.read_text())["general"]["name"].replace("-", "_")
        source = f"kernels/{build.parent.name}/torch-ext/{name}"
        assert included.get(source) == f"hf_attn/ops/{name}", f"{source} is not in the wheel"
        assert (ROOT / source / "__init__.py").is_file()
    assert included.pop("model_cards") == "hf_attn/integrations/hub/templates"
    assert len(included) == len(list((ROOT / "kernels").glob("*/build.toml"))) > 0


def test_files_are_as_long_as_their_one_idea():
    """At most 400 lines, or a reason in the first ones ("Long because ...")."""
    folders = ("hf_attn", "kernels", "tests", "recipes", "examples")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        lines = path.read_text().splitlines()
        said = any("Long because" in line for line in lines[:8])
        assert len(lines) <= 400 or said, f"{path.relative_to(ROOT)} has {len(lines)} lines: split it, or say why not"


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_distribution_is_not_shadowed():
    """Python started in the repository root imports the `kernels` package of the registry, not our folder."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the distribution kernels is not installed")
    run_python("import hf_attn, kernels; kernels.get_local_kernel")


IMPORT_COST = """
import sys, time, json
import transformers.modeling_utils, transformers.masking_utils
before = set(sys.modules)
start = time.perf_counter()
import hf_attn
seconds = time.perf_counter() - start
new = sorted({m.split('.')[0] for m in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "new": new}))
"""


def test_import_is_light():
    cost = min((json.loads(run_python(IMPORT_COST)) for _ in range(3)), key=lambda c: c["seconds"])
    assert cost["seconds"] < 0.3, cost
    assert not {"triton", "diffusers", "peft", "accelerate", "matplotlib", "typer"} & set(cost["new"]), cost


def test_import_needs_no_network():
    code = """
import socket
def refuse(*a, **k): raise AssertionError("network touched")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import hf_attn
print(len(hf_attn.list_mechanisms()))
"""
    assert int(run_python(code, HF_HUB_OFFLINE="0")) >= 2
