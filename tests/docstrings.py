"""How well the public functions are described: `python -m tests.docstrings [--list]`.

A public function is one without an underscore in its name, its class and its module, in any room but `bench` (scripts)
and `cli` (whose help typer writes); methods count, overloads and properties of one line do not. It is

- documented in full when it has a docstring that gives the shape of tensors it takes or returns, and names the errors
  that it raises itself; "As ..." and "See ..." refer to another description, which then has both;
- typed in full when every argument and what it returns are annotated.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hf_attn"
LEFT_OUT = {"bench", "cli"}
# A shape: `[B, H, N, D]`, `[B]`, `[..., m]`, or said in words.
SHAPE = re.compile(r"\[[A-Za-z0-9_.*+(|][^\]\n]*\]|scalar|same shape|shaped? (as|like)|one number|a number", re.I)
ERRORS = re.compile(r"\braises?\b|Error\b|\brefus", re.I)
BY_NAME = re.compile(r"(dict|Mapping)\[str, (torch\.)?Tensor\]|Callable\[.*\]")
# What a user is to be told of; NotImplementedError in a base class, for one, is not.
TOLD = {"ValueError", "TypeError", "RuntimeError", "KeyError", "ImportError", "FileExistsError", "FileNotFoundError"}


@dataclass(frozen=True)
class Function:
    """One public function: where it is, and what its description lacks (nothing when it is full)."""

    name: str
    where: str
    lacks: tuple[str, ...]
    typed: bool


def public_functions(package: Path = PACKAGE) -> list[Function]:
    """Every public function of the package, in the order of its files."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in LEFT_OUT or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        for owner, node in _definitions(ast.parse(path.read_text())):
            name = ".".join([*parts, *owner, node.name]).replace("__init__.", "")
            where = f"{path.relative_to(package.parent)}:{node.lineno}"
            found.append(Function(name, where, tuple(_lacks(node)), _is_typed(node, bool(owner))))
    return found


def _definitions(tree: ast.Module) -> Iterator[tuple[list[str], ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _is_public(node):
            yield [], node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and _is_public(inner):
                    yield [node.name], inner


def _is_public(node: ast.FunctionDef) -> bool:
    marks = {ast.unparse(mark).split("(")[0].split(".")[-1] for mark in node.decorator_list}
    short = "property" in marks and len(node.body) <= 2
    return not node.name.startswith("_") and not short and not marks & {"overload", "setter"}


def _lacks(node: ast.FunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node) or ""
    if not text:
        yield "docstring"
    elif not text.startswith(("As ", "See `")):
        if _has_tensors(node) and not SHAPE.search(text):
            yield "shapes"
        if _raises(node) and not ERRORS.search(text):
            yield "errors"


def _has_tensors(node: ast.FunctionDef) -> bool:
    annotations = [argument.annotation for argument in _arguments(node)] + [node.returns]
    # Weights by name are of many shapes.
    texts = (BY_NAME.sub("", ast.unparse(a)) for a in annotations if a is not None)
    return any(re.search(r"\bTensor\b", text) for text in texts)


def _raises(node: ast.FunctionDef) -> bool:
    raised = [inner.exc for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc is not None]
    return any(ast.unparse(error).split("(")[0] in TOLD for error in raised)


def _arguments(node: ast.FunctionDef) -> list[ast.arg]:
    given = node.args
    more = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *more]


def _is_typed(node: ast.FunctionDef, method: bool) -> bool:
    static = any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list)
    arguments = _arguments(node)[1 if method and not static else 0 :]
    return node.returns is not None and all(argument.annotation is not None for argument in arguments)


def shares(functions: list[Function]) -> tuple[float, float]:
    """Shares that are documented in full, and typed in full."""
    count = len(functions)
    return sum(not f.lacks for f in functions) / count, sum(f.typed for f in functions) / count


def main() -> None:
    """Print both shares by room, and with --list every function that lacks something."""
    functions = public_functions()
    if "--list" in sys.argv:
        for function in functions:
            lacks = [*function.lacks, *([] if function.typed else ["types"])]
            if lacks:
                print(f"{function.where}: {function.name} lacks {', '.join(lacks)}")
    rooms: dict[str, list[Function]] = {}
    for function in functions:
        rooms.setdefault(Path(function.where.split(":")[0]).parts[1].removesuffix(".py"), []).append(function)
    for room, inside in [*rooms.items(), ("all", functions)]:
        full, typed = shares(inside)
        print(f"{room:14} {len(inside):5} functions  {full:6.1%} documented in full  {typed:6.1%} typed in full")


if __name__ == "__main__":
    main()
