"""Compiling, finding and loading the CPU kernel. It is C++ without torch's headers, so no release of torch breaks it.

Nothing is compiled unless asked for: `build` does that once, and the library then lies in the user's cache, under a
name that holds a digest of the source and of the processor. Another version or another machine has its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("tiles.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
CACHE_VARIABLE = "HF_ATTN_CACHE"
_COMPILERS = ("c++", "g++", "clang++")
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ATTEND = (
    _INT, *[_POINTER] * 5, *[_LONG] * 5, ctypes.c_float, _LONG, *[_POINTER] * 5, _LONG, *[_POINTER] * 7, _INT,
    *[_POINTER] * 5, _LONG, _INT,
)  # fmt: skip

_IMPORTANCE = (_INT, *[_POINTER] * 3, _LONG, ctypes.c_float, *[_LONG] * 5, *[_POINTER] * 2, _INT)


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says what to do."""


def cache_folder() -> Path:
    """Where built libraries lie: HF_ATTN_CACHE, else `hf_attn` in XDG_CACHE_HOME or in `~/.cache`."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_attn"


def built_file() -> Path:
    """Where the library of this source for this processor is, or would be."""
    return cache_folder() / f"tiles-{_digest()}.so"


def compiler() -> str:
    """The C++ compiler: CXX when it is set, else the first of c++, g++ and clang++. Raises BuildError without one."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else _COMPILERS:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(
        (f"CXX={wanted!r} is not a program" if wanted else "no C++ compiler was found")
        + "; install one (Debian, Ubuntu: apt install g++) or set CXX to its path. Everything works without it, too."
    )


def build() -> Path:
    """Compile the kernel for this processor unless that has been done, and return the library's path.

    Raises BuildError when there is no compiler or it cannot compile the source; an earlier library stays.
    """
    target = built_file()
    if target.is_file():
        return target
    program = compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-")
    except OSError as error:
        raise BuildError(
            f"{target.parent} cannot be written ({error.strerror}); set {CACHE_VARIABLE} to a folder that can"
        ) from error
    with folder as temporary:
        made = Path(temporary, "tiles.so")
        command = [*shlex.split(program), *FLAGS, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not made.is_file():
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
            raise BuildError(
                f"{shlex.join(command)} failed with status {done.returncode}:\n{last}\n"
                "It takes a compiler with C++17 and OpenMP (g++ 11 or newer; on macOS: brew install gcc, CXX=g++-14)."
            )
        os.replace(made, target)
    _load.cache_clear()
    return target


def available() -> bool:
    """Whether the library has been built for this source and processor and can be loaded."""
    return library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded library; None when it has not been built."""
    return _load(str(cache_folder()))


@cache
def _load(folder: str) -> ctypes.CDLL | None:
    """`folder` is what the answer depends on beside the source and the machine, which do not change."""
    target = built_file()
    if not target.is_file():
        return None
    loaded = ctypes.CDLL(str(target))
    loaded.hfa_attend.argtypes = _ATTEND
    loaded.hfa_attend.restype = _INT
    loaded.hfa_importance.argtypes = _IMPORTANCE
    loaded.hfa_importance.restype = _INT
    loaded.hfa_abilities.restype = _INT
    return loaded


def has_matrix_tiles() -> bool:
    """Whether the library multiplies bfloat16 on the processor's AMX tiles."""
    loaded = library()
    return loaded is not None and bool(loaded.hfa_abilities() & 2)


@cache
def _digest() -> str:
    text = SOURCE.read_text() + " ".join(FLAGS) + platform.system() + platform.machine() + _processor()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: instructions for another one would stop the program."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return platform.processor()
