"""Building the kernels of `kernels/` for the Hub: variants without binaries, one a backend, that `kernels` can load."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

# Folder names of the backends that a kernel without compiled code may have.
BACKENDS = ("cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu")
_OPS = '''"""Namespace of the custom ops of this build, different from that of every other one."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of a custom op."""
    return f"{namespace}::{{op_name}}"
'''


def kernel_sources() -> Path:
    """The folder `kernels/` of the source checkout that this package runs from; ValueError for an installed one."""
    folder = Path(__file__).resolve().parents[3] / "kernels"
    if not (folder / ".hf_attn_kernels").is_file():
        raise ValueError(
            "kernels are built from a source checkout of hf-attn, and this is an installed package: run the command in "
            'a clone, installed with pip install -e "."'
        )
    return folder


def kernel_folders(sources: Path) -> dict[str, Path]:
    """Every folder with a `build.toml`, by name, in alphabetical order."""
    return {path.parent.name: path.parent for path in sorted(sources.glob("*/build.toml"))}


def build_kernel(folder: Path, output: Path) -> list[Path]:
    """Write the kernel in `folder` to `output/build/torch-<backend>`, with its README beside `build`.

    Every variant is the Python source as it is and the files it reads, with an op namespace of its own in `_ops.py`, so
    that it can be loaded beside the package and beside other versions, and a `metadata.json` with a digest of every
    file. C++ among them travels as text, which whoever loads the kernel may compile; nothing is compiled here. The same
    sources give the same build. What `output` held of an earlier build is replaced.

    Returns the variant folders. Raises ValueError when `build.toml` or the sources are not those of a kernel that loads
    without being compiled, naming the file and the entry.
    """
    general, suffixes = _read_build(folder)
    source = folder / "torch-ext" / general["name"].replace("-", "_")
    files = _source_files(source, suffixes)
    fingerprint = hashlib.sha256(json.dumps([general, {name: _digest(data) for name, data in files.items()}]).encode())
    build = output / "build"
    if build.exists():
        shutil.rmtree(build)
    variants = []
    for backend in general["backends"]:
        namespace = f"_{source.name}_{backend}_{fingerprint.hexdigest()[:7]}"
        variant = build / f"torch-{backend}"
        written = files | {"_ops.py": _OPS.format(namespace=namespace).encode()}
        for name, data in written.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        metadata = {
            "id": namespace,
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {name: _digest(data) for name, data in written.items()}},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    for name in ("README.md", "build.toml"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    return variants


def kernels_version() -> str | None:
    """Version of the distribution `kernels`, None without it (a folder of that name may be importable all the same)."""
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_build(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The table `general` of `build.toml`, checked, and the suffixes of the files that belong to the kernel."""
    path = folder / "build.toml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a kernel: it has no build.toml")
    try:
        build = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    general, suffixes = build.get("general", {}), build.get("torch-noarch", {}).get("pyext")
    wanted = {"name": str, "version": int, "license": str, "backends": list}
    for entry, kind in wanted.items():
        if not isinstance(general.get(entry), kind):
            raise ValueError(f"{path}: general.{entry} must be a {kind.__name__}, got {general.get(entry)!r}")
    if not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"]):
        raise ValueError(f"{path}: general.name must be lower-case letters, digits and dashes, got {general['name']!r}")
    unknown = sorted(set(general["backends"]) - set(BACKENDS))
    if unknown or not general["backends"]:
        raise ValueError(f"{path}: general.backends must be some of {', '.join(BACKENDS)}, got {general['backends']}")
    if not suffixes:
        raise ValueError(f"{path}: torch-noarch.pyext is missing: only kernels that need no compiler are built here")
    return general, tuple(f".{suffix}" for suffix in suffixes)


def _source_files(source: Path, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Contents of the kernel's files by relative path, sorted."""
    for name in ("__init__.py", "_ops.py"):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no {name}")
    paths = sorted(path for path in source.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)
    return {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}


def _digest(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
