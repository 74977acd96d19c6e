"""`hf-attn build-cpu`: compile the CPU kernel, check it, and say what it brings on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer

from hf_attn.cli.common import console, failed, one_clear_line


def build_cpu(
    force: bool = typer.Option(False, "--force", help="Compile anew, even if that has been done."),
    remove: bool = typer.Option(False, "--remove", help="Delete what was compiled for you, older versions too."),
) -> None:
    """Compile the CPU kernel for this processor, once, and check it; then sparse attention on CPUs uses it by itself.

    It takes a C++ compiler: g++ 11 or newer, or clang++ with OpenMP. Without it everything works, slower.

    Example: `hf-attn build-cpu`
    """
    with one_clear_line():
        if force and remove:
            raise ValueError("--force compiles and --remove deletes: give one of them")
        if remove:
            _remove()
            return
    file = _built(force)
    try:
        facts = _checked(file)
    except RuntimeError as error:
        raise failed(str(error), status=1) from None
    _tell(facts)


def _remove() -> None:
    from hf_attn.ops.hfattn_sparse.native import library

    removed = library.remove()
    for path in removed:
        console.print(f"deleted {path}", highlight=False, soft_wrap=True)
    if not removed:
        console.print(f"nothing is built in {library.cache_folder()}", highlight=False, soft_wrap=True)


def _built(force: bool) -> Path:
    from hf_attn.ops.hfattn_sparse.native import library

    try:
        there, start = os.path.isfile(library.built_file()), time.perf_counter()
        file = library.build(force=force)
    except library.BuildError as error:
        raise failed(str(error), status=1) from None
    seconds = f"compiled in {time.perf_counter() - start:.0f} s"
    told = "was there already; --force compiles it anew" if there and not force else seconds
    console.print(f"{file} ({told})", highlight=False, soft_wrap=True)
    return file


def _checked(file: Path) -> dict[str, Any]:
    """Facts from `hf_attn.bench.cpu_kernel`, in a process of its own: wrong machine code may end it.

    Raises RuntimeError, with the library deleted, when it does not end well.
    """
    # The same path: this package and no other one that lies in the folder of the caller.
    code = f"import sys; sys.path[:] = {sys.path!r}; from hf_attn.bench.cpu_kernel import main; main(['--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    file.unlink(missing_ok=True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    reason = f"it ended with {signal.Signals(-done.returncode).name}" if done.returncode < 0 else last
    raise RuntimeError(
        f"the compiled kernel failed its check and was deleted: {reason}. Attention runs on the torch path, as before; "
        "set CXX to try another compiler"
    )


def _tell(facts: dict[str, Any]) -> None:
    from hf_attn.bench.cpu_kernel import Speed, told

    tiles = "on AMX tiles" if facts["matrix_tiles"] else "in float32 arithmetic (no AMX here)"
    lines = [f"bfloat16 products: {tiles}", "checked: float32 and bfloat16 against the torch path", facts["call"]]
    lines += [f"  {told(Speed(**one))}" for one in facts["speeds"]]
    lines.append("It is used from now on, where it pays; HF_ATTN_BACKEND=torch keeps it off, --remove deletes it.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
