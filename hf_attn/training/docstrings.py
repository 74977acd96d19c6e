"""A ranking corpus of real text without a download: docstrings of installed packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_WORD = re.compile(r"[a-z0-9]+")
_MIN_QUERY, _MIN_DOCUMENT, _MAX_DOCUMENT = 4, 12, 120  # words
# Longest run of words that a query may share with its document: longer ones are copied spans.
SHARED_WORDS = 3


@dataclass(frozen=True)
class Entry:
    """A function or class: `query` is the summary line of its docstring, `document` the rest; `module` its file."""

    query: str
    document: str
    module: str


def docstring_entries(packages: Sequence[str] = ("stdlib", "numpy", "sympy", "torch")) -> list[Entry]:
    """Entries of the packages' functions and classes, in the order of their files; nothing is imported.

    Kept are docstrings with a summary of at least 4 words and a body of at least 12 (doctest lines and section
    underlines left out, cut after 120), whose summary shares no run of more than `SHARED_WORDS` words with the body.
    Queries and documents that repeat are left out, whatever package they are of.

    Raises ValueError for a package that is not installed.
    """
    found: list[Entry] = []
    queries, documents = set(), set()
    for package in packages:
        for file in _files(package):
            for entry in _entries(file, package):
                query, document = _normal(entry.query), _normal(entry.document)
                if query in queries or document in documents:
                    continue
                queries.add(query)
                documents.add(document)
                found.append(entry)
    return found


def split_by_module(entries: Iterable[Entry], held_out: float = 0.3) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) entries: whole files on one side, by a digest of their name."""
    sides: tuple[list[Entry], list[Entry]] = ([], [])
    for entry in entries:
        digest = int(hashlib.sha256(entry.module.encode()).hexdigest()[:8], 16)
        sides[digest < held_out * 2**32].append(entry)
    return sides


def leakage(train: Sequence[Entry], held_out: Sequence[Entry]) -> dict[str, int]:
    """What a ranker could know or copy: documents, queries and files on both sides, and copied spans.

    `longest_copied_run` is the longest run of words that a held-out query shares with its document.
    """
    runs = [shared_run(entry.query, entry.document) for entry in held_out]
    return {
        "documents_in_both": len({_normal(e.document) for e in train} & {_normal(e.document) for e in held_out}),
        "queries_in_both": len({_normal(e.query) for e in train} & {_normal(e.query) for e in held_out}),
        "modules_in_both": len({e.module for e in train} & {e.module for e in held_out}),
        "queries_inside_their_document": sum(_normal(e.query) in _normal(e.document) for e in held_out),
        "longest_copied_run": max(runs, default=0),
    }


def shared_run(query: str, document: str) -> int:
    """Words of the longest run that both texts have, case and punctuation aside."""
    words, text = words_of(query), f" {' '.join(words_of(document))} "
    longest = 0
    for start in range(len(words)):
        while start + longest < len(words) and f" {' '.join(words[start : start + longest + 1])} " in text:
            longest += 1
    return longest


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return _WORD.findall(text.lower())


def _normal(text: str) -> str:
    return " ".join(words_of(text))


def _files(package: str) -> list[Path]:
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [*root.glob("*.py"), *root.glob("[a-z]*/**/*.py")]
        left_out = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"package {package!r} is not installed; remove it from the list, or pip install {package}")
        root = Path(spec.origin).parent
        files, left_out = list(root.rglob("*.py")), {"tests", "test", "testing", "_vendor"}
    return sorted(file for file in files if not left_out & set(file.relative_to(root).parts))


def _entries(file: Path, package: str) -> list[Entry]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    module = f"{package}/{file.parent.name}/{file.name}"
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        parts = re.split(r"\n\s*\n", text.strip(), maxsplit=1) if text else []
        if len(parts) < 2:
            continue
        query, document = " ".join(parts[0].split()), _prose(parts[1])
        enough = _MIN_QUERY <= len(words_of(query)) <= 30 and len(words_of(document)) >= _MIN_DOCUMENT
        if enough and shared_run(query, document) <= SHARED_WORDS:
            found.append(Entry(query, document, module))
    return found


def _prose(body: str) -> str:
    """The body on one line, without doctests and underlines of sections."""
    lines = [line.strip() for line in body.splitlines()]
    prose = [x for x in lines if x and not x.startswith((">>>", "...")) and not re.fullmatch(r"[-=~^]+", x)]
    return " ".join(" ".join(prose).split()[:_MAX_DOCUMENT])
