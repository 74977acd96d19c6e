"""The kernels as repositories for the Hub: what a build holds, that `kernels` loads it, and what it exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_attn.cli.app import app
from hf_attn.integrations.hub.kernels import build_kernel, kernel_folders, kernel_sources, kernels_version

FOLDERS = kernel_folders(kernel_sources())
needs_kernels = pytest.mark.skipif(kernels_version() is None, reason="the distribution kernels is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with every kernel, built."""
    output = tmp_path_factory.mktemp("build")
    result = CliRunner().invoke(app, ["build-kernels", "--output", str(output)])
    assert result.exit_code == 0, result.output
    return output


def run_python(code: str, *arguments: str, **environment: str) -> str:
    # With telemetry off, `kernels` 0.17 sends a header that huggingface_hub refuses.
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_a_build_is_complete(name, built):
    variants = sorted((built / name / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    identities = set()
    for variant in variants:
        metadata = json.loads((variant / "metadata.json").read_text())
        files = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()} - {"metadata.json"}
        assert files == metadata["digest"]["files"].keys() and "launch_table.json" in files
        assert "native/tiles.cpp" in files and "native/library.py" in files
        assert "hf_attn::" not in (variant / "_ops.py").read_text()
        identities.add(metadata["id"])
        assert metadata["id"] in (variant / "_ops.py").read_text() and metadata["backend"] == {"type": variant.name[6:]}
    assert len(identities) == 4
    card = (built / name / "README.md").read_text()
    assert "library_name: kernels" in card and f"# {name}" in card


@needs_kernels
@pytest.mark.parametrize("name", FOLDERS)
def test_the_distribution_agrees_with_build_and_metadata(name, built):
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    Build.open(FOLDERS[name])
    for variant in (built / name / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert str(metadata.name) == name and str(metadata.backend.backend_type) == variant.name[6:]


def test_the_same_sources_give_the_same_build_and_others_another(tmp_path):
    folder = next(iter(FOLDERS.values()))
    first, second = build_kernel(folder, tmp_path / "a")[0], build_kernel(folder, tmp_path / "b")[0]
    assert (first / "metadata.json").read_bytes() == (second / "metadata.json").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "torch-ext" / folder.name.replace("-", "_") / "counters.py").open("a") as file:
        file.write("\n")
    third = build_kernel(copy, tmp_path / "a")[0]
    assert json.loads((third / "metadata.json").read_text())["id"] not in (second / "metadata.json").read_text()


LOAD = """
import os, sys, torch
from pathlib import Path
import kernels
where = sys.argv[1]
if len(sys.argv) == 2:
    kernel = kernels.get_local_kernel(Path(where))
else:
    os.environ["LOCAL_KERNELS"] = f"hf-attn/hfattn-sparse={where}"
    kernel = kernels.get_kernel("hf-attn/hfattn-sparse", version=1)
assert str(Path(kernel.__file__)).startswith(where), kernel.__file__
assert set(kernel.__all__) <= set(dir(kernel)) and kernel.supports_flash_attn is True

from hf_attn import ops
from hf_attn.pattern import BlockPattern
query, key, value = (torch.randn(1, h, 100, 16, requires_grad=True) for h in (4, 2, 2))
lists = kernel.select_blocks(query, key, block_q=16, block_k=16, rule="density", amount=0.3, local=1)
pattern = ops.select_blocks(query, key, block_q=16, block_k=16, top_k=0.3, local=1)
assert torch.equal(lists, pattern.indices)
ours, _ = kernel.block_sparse_attention(query, key, value, lists, block_q=16, block_k=16, causal=True)
theirs = ops.block_sparse_attention(query, key, value, pattern, causal=True)
assert torch.equal(ours, theirs)
grads = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (ours, theirs)]
assert all(torch.equal(a, b) for a, b in zip(*grads))
routes = kernel.select_routes(query, key, block_size=16, top_k=2)
ours, _ = kernel.routed_block_attention(query, key, value, routes, block_size=16)
assert torch.equal(ours, ops.routed_block_attention(query, key, value, routes, block_size=16))
again = torch.compile(kernel.select_routes, backend="eager", fullgraph=True)(query, key, block_size=16, top_k=2)
assert torch.equal(again, routes)
ops.reset_path_counts()
assert kernel.path_counts() and not ops.path_counts(), "each has counters of its own"
names = {n.split("::")[0] for n in torch._C._dispatch_get_all_op_names() if n.endswith("::select_routes")}
assert "hf_attn" in names and len(names) == 2, names
print("both", names)
"""


@needs_kernels
@pytest.mark.parametrize("way", ["get_local_kernel", "variant folder", "LOCAL_KERNELS"])
def test_kernel_and_package_work_in_one_process(way, built):
    where = built / "hfattn-sparse"
    where = where / "build" / "torch-cpu" if way == "variant folder" else where
    arguments = [str(where)] + ["get_kernel"] * (way == "LOCAL_KERNELS")
    assert "both" in run_python(LOAD, *arguments, HF_HUB_OFFLINE="1")


NATIVE = """
import importlib, os, sys, torch
from pathlib import Path
import kernels
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
native = importlib.import_module(kernel.__name__ + ".native")
from hf_attn.ops.hfattn_sparse import native as packaged
assert native.__file__ != packaged.__file__ and native.built_file() == packaged.built_file()
assert native.available() and native.build() == packaged.build(), "one library for both"
query, key, value = (torch.randn(1, h, 100, 16) for h in (4, 2, 2))
lists = kernel.select_blocks(query, key, block_q=16, block_k=16, rule="density", amount=0.3, local=1)
out = {}
for path in ("torch", "native"):
    os.environ["HF_ATTN_BACKEND"] = path
    out[path], _ = kernel.block_sparse_attention(query, key, value, lists, block_q=16, block_k=16, causal=True)
torch.testing.assert_close(*out.values())
print(kernel.path_counts())
"""


@needs_kernels
@pytest.mark.needs_cxx
def test_a_loaded_kernel_uses_the_library_of_the_package(built, native_folder):
    """The same sources have the same name in the cache."""
    printed = run_python(NATIVE, str(built / "hfattn-sparse"), HF_HUB_OFFLINE="1", HF_ATTN_CACHE=str(native_folder))
    assert "'block_sparse_attention | torch: native': 1" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no build.toml"),
        ("[general", "is not valid TOML"),
        ("[general]\nname = 'a-b'\nversion = '1'", "general.version must be a int, got '1'"),
        ("[general]\nname = 'A'\nversion = 1\nlicense = 'x'\nbackends = ['cpu']", "general.name must be lower-case"),
        ("[general]\nname = 'ab'\nversion = 1\nlicense = 'x'\nbackends = ['gpu']", "general.backends must be some of"),
        ("[general]\nname = 'ab'\nversion = 1\nlicense = 'x'\nbackends = ['cpu']", "torch-noarch.pyext is missing"),
        (
            "[general]\nname = 'ab'\nversion = 1\nlicense = 'x'\nbackends = ['cpu']\n[torch-noarch]\npyext = ['py']",
            "has no __init__.py",
        ),
    ],
)
def test_a_folder_that_is_no_kernel_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "build.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_kernel(tmp_path, tmp_path / "out")


def test_command_line_refuses_an_unknown_kernel(tmp_path):
    result = CliRunner().invoke(app, ["build-kernels", "hfattn-sparce", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "did you mean 'hfattn-sparse'?" in result.output
    assert "hf-attn build-kernels" in CliRunner().invoke(app, ["build-kernels", "--help"]).output


@needs_kernels
@pytest.mark.parametrize("name", FOLDERS)
def test_the_example_of_the_card_runs(name, built):
    """As it stands, but for the length."""
    blocks = (built / name / "README.md").read_text().split("```python\n")[1:]
    example = blocks[0].split("```")[0].replace("4096", "512")
    code = (
        f"import os\nos.environ['LOCAL_KERNELS'] = 'hf-attn/{name}={built / name}'\n{example}\nprint(tuple(out.shape))"
    )
    assert "(1, 8, 512, 64)" in run_python(code, HF_HUB_OFFLINE="1")


def test_dtype_and_shape_errors_of_the_kernel_itself():
    from hf_attn.ops import hfattn_sparse as kernel

    query, key = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="with Hq a multiple of Hkv, got"):
        kernel.select_routes(query, key, block_size=4, top_k=1)
    with pytest.raises(ValueError, match="must have one floating-point dtype"):
        kernel.select_routes(query.half(), query, block_size=4, top_k=1)
    with pytest.raises(
        ValueError, match="rule must be one of 'top_k', 'density', 'threshold', 'cumulative', got 'best'"
    ):
        kernel.select_blocks(query, query, block_q=4, block_k=4, rule="best", amount=1)
