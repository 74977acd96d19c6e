"""The library of the compiled CPU kernel: where it lies, when it is compiled, and what a build that fails leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn.ops.hfattn_sparse.native import library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and digests worked out anew."""
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    library._digest.cache_clear()
    yield tmp_path / "cache"
    library._digest.cache_clear()
    library._load.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def digest() -> str:
    library._digest.cache_clear()
    return library._digest()


def test_the_name_follows_sources_flags_and_processor(cache, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(library.SOURCE.parent, tmp_path / "native"))
    monkeypatch.setattr(library, "SOURCE", copy / "tiles.cpp")
    seen = [digest()]
    assert digest() == seen[0] and library.built_file() == cache / f"tiles-{seen[0]}.so"
    (copy / "notes.txt").write_text("not a source")
    assert digest() == seen[0]
    for change in (
        lambda: (copy / "tiles.cpp").open("a").write("\n"),
        lambda: (copy / "another.h").write_text("// first"),
        lambda: (copy / "another.h").write_text("// second"),
        lambda: (copy / "another.h").rename(copy / "renamed.h"),
        lambda: monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g")),
        lambda: monkeypatch.setattr(library, "_processor", lambda: "amx_tile"),
        lambda: monkeypatch.setattr(library, "_processor", lambda: "avx2"),
    ):
        change()
        seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_the_cache_folder(monkeypatch):
    for name in ("HF_ATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert library.cache_folder() == Path("/home/me/.cache/hf_attn")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert library.cache_folder() == Path("/caches/hf_attn")
    monkeypatch.setenv("HF_ATTN_CACHE", "/mine")
    assert library.cache_folder() == Path("/mine")


def test_a_user_without_a_home(monkeypatch):
    """As in a container whose user id has no entry: attention runs as ever, only a build needs a folder."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HF_ATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.Path, "home", home)
    assert library.library() is None and not library.has_matrix_tiles()
    with pytest.raises(library.BuildError, match="no home folder; set HF_ATTN_CACHE"):
        library.build()


def test_the_compiler(cache, tmp_path, monkeypatch):
    own = compiler(tmp_path, "exit 0")
    for name in (own, f"{own} -DX=1", f"  {own} "):
        monkeypatch.setenv("CXX", name)
        assert library.compiler() == name.strip()
    for name in ("no-such-compiler", "g++ 'torn", "''"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(library.BuildError, match="is not a program; install one"):
            library.compiler()
    for nothing in ("", "  "):
        monkeypatch.setenv("CXX", nothing)
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        with pytest.raises(library.BuildError, match=r"no C\+\+ compiler was found; install one"):
            library.compiler()


FAILURES = {
    "an error": (
        "echo 'tiles.cpp:1: error: no' >&2; exit 3",
        r"failed with status 3:\ntiles.cpp:1: error: no\nIt takes",
    ),
    "only the end of a long one": ("seq 40; exit 1", r"status 1:\n29\n(\d+\n){11}It takes a compiler with C\+\+17"),
    "silence": ("exit 1", "failed with status 1 and said nothing. It takes"),
    "nothing written": ("exit 0", "wrote no library: is CXX a C"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("before", [False, True], ids=["first", "force"])
def test_a_build_that_fails_leaves_what_was_there(name, before, cache, tmp_path, monkeypatch):
    script, message = FAILURES[name]
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    if before:
        cache.mkdir()
        library.built_file().write_text("the earlier one")
        assert library.build() == library.built_file(), "there already: nothing is compiled"
    with pytest.raises(library.BuildError, match=message):
        library.build(force=before)
    assert [path.name for path in cache.iterdir()] == [library.built_file().name] * before
    assert not before or library.built_file().read_text() == "the earlier one"


def test_a_program_that_cannot_be_started(cache, tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    path.write_bytes(b"\x00\x01 no program")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(library.BuildError, match="cannot be started .*; set CXX"):
        library.build()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 0"))
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path / "file" / "cache"))
    assert library.library() is None
    with pytest.raises(library.BuildError, match="cannot be written .*; set HF_ATTN_CACHE to a folder that can"):
        library.build()


def test_a_library_that_cannot_be_loaded_warns_and_is_not_used(cache):
    cache.mkdir()
    library.built_file().write_text("no machine code")
    library._load.cache_clear()
    with pytest.warns(UserWarning, match="is not used, for it cannot be loaded .*; hf-attn build-cpu --force"):
        assert library.library() is None
    assert library.library() is None, "and says so once"


def test_remove_deletes_libraries_and_nothing_else(cache):
    assert library.remove() == []
    cache.mkdir()
    ours = [cache / "tiles-0123456789abcdef.so", library.built_file()]
    others = [cache / name for name in ("tiles-mine.so", "tiles-0123456789abcdef.so.txt", "notes")]
    for path in (*ours, *others):
        path.write_text("")
    assert library.remove() == sorted(ours)
    assert sorted(cache.iterdir()) == sorted(others) and library.library() is None


USE = """
import torch, hf_attn
from hf_attn import ops
from hf_attn.pattern import BlockPattern
q = torch.randn(1, 1, 512, 16)
pattern = BlockPattern.from_dense(torch.ones(1, 1, 4, 4, dtype=bool), block_q=128, block_k=128, q_len=512, k_len=512)
ops.block_sparse_attention(q, q, q, pattern)
assert "block_sparse_attention | torch: native" not in ops.path_counts(), ops.path_counts()
"""


def test_nothing_is_compiled_unless_asked_for(tmp_path):
    """A compiler that leaves a mark is never started by importing or calling."""
    cxx = compiler(tmp_path, f"touch {tmp_path}/started")
    environment = {**os.environ, "CXX": cxx, "HF_ATTN_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "started").exists() and not (tmp_path / "cache").exists()
