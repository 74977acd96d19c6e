"""Compiling, finding and loading the CPU kernel. It is C++ without torch's headers, so no release of torch breaks it.

Nothing is compiled unless asked for: `build` does that once, and the library then lies in the user's cache, under a
name that holds a digest of the sources and of the processor. Another version or another machine has its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

# What is compiled; every .cpp and .h beside it counts as its source.
SOURCE = Path(__file__).with_name("tiles.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
CACHE_VARIABLE = "HF_ATTN_CACHE"
_COMPILERS = ("c++", "g++", "clang++")
_NAME = re.compile(r"tiles-[0-9a-f]{16}\.so")
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ATTEND = (
    _INT, *[_POINTER] * 5, *[_LONG] * 5, ctypes.c_float, _LONG, *[_POINTER] * 5, _LONG, *[_POINTER] * 7, _INT,
    *[_POINTER] * 5, _LONG, _INT,
)  # fmt: skip

_WINDOWS = (_INT, *[_POINTER] * 5, *[_LONG] * 2, ctypes.c_float, *[_LONG] * 5, *[_POINTER] * 10, _LONG, _INT)
_ROUTED = (
    _INT, *[_POINTER] * 5, *[_LONG] * 2, *[_POINTER] * 3, ctypes.c_float, *[_LONG] * 6, _POINTER, _LONG, _INT,
)  # fmt: skip
_IMPORTANCE = (_INT, *[_POINTER] * 3, _LONG, ctypes.c_float, *[_LONG] * 5, *[_POINTER] * 2, _INT)


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says what to do."""


def cache_folder() -> Path:
    """Where built libraries lie: HF_ATTN_CACHE, else `hf_attn` in XDG_CACHE_HOME or in `~/.cache`.

    Raises BuildError where none of them says anything, for a user without a home folder.
    """
    own, general = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    if own or general:
        return Path(own) if own else Path(general or "", "hf_attn")
    try:
        return Path.home() / ".cache" / "hf_attn"
    except RuntimeError as error:
        raise BuildError(f"this user has no home folder; set {CACHE_VARIABLE} to a folder of yours") from error


def built_file() -> Path:
    """Where the library of these sources for this processor is, or would be."""
    return cache_folder() / f"tiles-{_digest()}.so"


def compiler() -> str:
    """The C++ compiler: CXX when it is set, else the first of c++, g++ and clang++. Raises BuildError without one."""
    wanted = os.environ.get("CXX", "").strip()
    for name in [wanted] if wanted else _COMPILERS:
        if shutil.which(_words(name)[0]):
            return name
    raise BuildError(
        (f"CXX={wanted!r} is not a program" if wanted else "no C++ compiler was found")
        + "; install one (Debian, Ubuntu: apt install g++) or set CXX to its path. Everything works without it, too."
    )


def _words(command: str) -> list[str]:
    """The program and its options; a name with a stray quotation mark is one word."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def build(*, force: bool = False) -> Path:
    """Compile the kernel for this processor, unless that has been done and `force` is not set; the library's path.

    Raises BuildError when there is no compiler or it cannot compile the source; an earlier library stays.
    """
    target = built_file()
    if os.path.isfile(target) and not force:
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
        command = [*_words(program), *FLAGS, str(SOURCE), "-o", str(made)]
        _compile(command)
        if not made.is_file():
            raise BuildError(f"{shlex.join(command)} wrote no library: is CXX a C++ compiler?")
        os.replace(made, target)
    _load.cache_clear()
    return target


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started ({error.strerror}); set CXX to a C++ compiler") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-12:]
        said = "\n".join([":", *last, ""]) if last else " and said nothing. "
        raise BuildError(
            f"{shlex.join(command)} failed with status {done.returncode}{said}"
            "It takes a compiler with C++17 and OpenMP (g++ 11 or newer; on macOS: brew install gcc, CXX=g++-14)."
        )


def remove() -> list[Path]:
    """Delete every library in the cache, of other versions and processors too, and return what was deleted.

    Nothing else there is touched, and programs that run keep what they have loaded. Raises OSError.
    """
    folder = cache_folder()
    ours = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if os.path.isdir(folder) else []
    for path in ours:
        path.unlink(missing_ok=True)
    _load.cache_clear()
    return ours


def available() -> bool:
    """Whether the library has been built for these sources and this processor and can be loaded."""
    return library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded library; None when it has not been built, or cannot be loaded, which warns."""
    try:
        return _load(str(cache_folder()))
    except BuildError:
        return None


@cache
def _load(folder: str) -> ctypes.CDLL | None:
    """`folder` is what the answer depends on beside the sources and the machine, which do not change."""
    target = built_file()
    if not os.path.isfile(target):  # False where the folder may not be read, which Path would raise
        return None
    try:
        loaded = ctypes.CDLL(str(target))
    except OSError as error:  # a damaged file, or a system library that is older here or missing
        text = f"{target} is not used, for it cannot be loaded ({error}); hf-attn build-cpu --force compiles it anew"
        warnings.warn(text, stacklevel=3)
        return None
    loaded.hfa_attend.argtypes = _ATTEND
    loaded.hfa_attend.restype = _INT
    loaded.hfa_attend_routed.argtypes = _ROUTED
    loaded.hfa_attend_routed.restype = _INT
    loaded.hfa_importance.argtypes = _IMPORTANCE
    loaded.hfa_importance.restype = _INT
    loaded.hfa_windows.argtypes = _WINDOWS
    loaded.hfa_windows.restype = _INT
    loaded.hfa_lanes.restype = _INT
    loaded.hfa_abilities.restype = _INT
    return loaded


def strip_rows() -> int:
    """Query rows that the library works on at one time; it must be built."""
    loaded = library()
    assert loaded is not None
    return 2 * loaded.hfa_lanes()


def has_matrix_tiles() -> bool:
    """Whether the library multiplies bfloat16 on the processor's AMX tiles."""
    loaded = library()
    return loaded is not None and bool(loaded.hfa_abilities() & 2)


@cache
def _digest() -> str:
    sources = sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [text for path in sources for text in (path.name, path.read_text())]
    parts += [*FLAGS, platform.system(), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: instructions for another one would stop the program."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return platform.processor()
