"""Attention on a CPU by a compiled kernel: optional, built once by `library.build`, used wherever it then can."""

from .library import BuildError, available, build, built_file, has_matrix_tiles, strip_rows
from .tiles import (
    MOST_SAMPLES,
    Lists,
    Pools,
    Rows,
    Segments,
    Windows,
    attend,
    attend_routed,
    attend_windows,
    importance,
    obstacle,
    pays,
    possible,
    refuse,
    wanted,
)

__all__ = [
    "MOST_SAMPLES",
    "BuildError",
    "Lists",
    "Pools",
    "Rows",
    "Segments",
    "Windows",
    "attend",
    "attend_windows",
    "attend_routed",
    "available",
    "build",
    "built_file",
    "has_matrix_tiles",
    "importance",
    "obstacle",
    "pays",
    "possible",
    "refuse",
    "strip_rows",
    "wanted",
]
