"""What happens in every cell, and the page that says so."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

import hf_attn
from hf_attn.ops import path_counts, reset_path_counts
from tests.compatibility.families import FAMILIES, Family, Host
from tests.compatibility.modes import GROUPS, MODES, Mode, Results, Subject, lacks, prefill

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
MECHANISMS = ("moba", "streaming")
REFERENCE = "transformers"
# (family, mode) that transformers' own attention does not survive either, and why.
UPSTREAM = {
    ("OPT", "4-D mask"): "the model counts positions from a 2-D mask",
    ("Qwen2-VL", "4-D mask"): "the model counts positions from a 2-D mask",
    ("Qwen2-VL", "decode"): "behind a cache, a padding mask needs position_ids made by generate",
    ("Qwen2-VL", "compile"): "the vision tower cuts images at lengths that are data",
}
KINDS = ("right", "part dense", "dense", "refused", "-")


@dataclass(frozen=True)
class Outcome:
    """`kind`: "right", "part dense", "dense", "refused" or "-" (not a mode of this model in transformers); `why`."""

    kind: str
    why: str = ""


def options_of(mechanism: str, family: Family) -> dict[str, object]:
    """Options under which a mechanism must equal dense attention, although its sparse op does the work."""
    if mechanism == "streaming":
        return {"num_sinks": 0, "window": 100_000, "block_size": 4}
    return {"block_size": 4, "top_k": 1000, "min_seq_len": 0, "decode": "full" if family.bidirectional else "moba"}


@contextlib.contextmanager
def sparse_ops():
    """The torch path forced, so that nothing goes dense because it is short; no warnings of tiny models."""
    with mock.patch.dict(os.environ, {"HF_ATTN_BACKEND": "torch"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def subject_of(family: Family, name: str) -> Subject:
    """A model under `name`: a mechanism, or `REFERENCE` or "eager" for transformers' own attention."""
    if name in (REFERENCE, "eager"):
        model = family.build(family.reference if name == REFERENCE else name)
        return Subject(family, Host.of(model), model, name)
    options = options_of(name, family)
    spec = hf_attn.spec(name, **options)
    model = family.build(family.implementation(spec))
    return Subject(family, Host.of(model), model, spec, name, options)


def _fresh(family: Family, name: str) -> Subject:
    kept = subject_of(family, name)
    return Subject(**{field: getattr(kept, field) for field in kept.__dataclass_fields__})


@cache
def reference_results(family: Family, mode: Mode, name: str = REFERENCE) -> Results | str:
    """What transformers' own attention gives, or why it has no such mode."""
    subject = _fresh(family, name)
    for need in mode.needs:
        if (why := lacks(subject, need)) is not None:
            return why
    try:
        with sparse_ops():
            return {k: v.clone() for k, v in (mode.reference or mode.run)(subject).items()}
    except Exception as error:
        # Only where it is known why: else a mistake of the test would pass for one of the host.
        why = UPSTREAM.get((family.name.split(",")[0], mode.name))
        if why is None:
            raise
        return f"transformers itself raises {type(error).__name__} with {family.reference}: {why}"


@cache
def run_cell(family: Family, mechanism: str, mode: Mode) -> Outcome:
    """Run a mode on both, compare, and say what happened. Whatever is neither right nor told raises AssertionError."""
    want = reference_results(family, mode)
    if isinstance(want, str):
        return Outcome("-", want)
    with sparse_ops():
        subject = _fresh(family, mechanism)
        hf_attn.reset_stats(subject.model)
        reset_path_counts()
        try:
            got = mode.run(subject)
        except ValueError as error:
            return _refusal(error, mechanism)
    JUDGES[mode.judge](got, want, family, mode)
    return _counted(subject, mode)


def _refusal(error: ValueError, mechanism: str) -> Outcome:
    """A refusal must name the mechanism and say what to do."""
    text = str(error)
    assert f"hf_attn_{mechanism}" in text, f"refused without naming the mechanism: {text}"
    remedies = ("Use ", "use ", "Load ", "Pass ", "pass ")
    assert any(word in text for word in remedies), f"refused without a remedy: {text}"
    return Outcome("refused", text)


def _counted(subject: Subject, mode: Mode) -> Outcome:
    """Kind of a cell whose results are equal, from the counters; all layers must have called, and sparse ops run."""
    layers = hf_attn.stats(subject.model)["layers"]
    expected = subject.family.called(mode.text_only)
    assert len(layers) == expected, f"{sorted(map(str, layers))} called, not {expected} layers"
    for number, layer in layers.items():
        assert layer["calls"] == layer["sparse_calls"] + sum(layer["dense_reasons"].values()), (number, layer)
    sparse = sum(layer["sparse_calls"] for layer in layers.values())
    reasons = sorted({reason for layer in layers.values() for reason in layer["dense_reasons"]})
    assert bool(path_counts()) == bool(sparse), f"{sparse} sparse calls, but the ops ran {path_counts()}"
    assert sparse or reasons
    kind = "dense" if not sparse else "part dense" if reasons else "right"
    return Outcome(kind, "; ".join(reasons))


# -- comparing ---------------------------------------------------------------------------------------------------------


def _close(got: Results, want: Results, family: Family, mode: Mode) -> None:
    assert got.keys() == want.keys(), f"{sorted(got)}, not {sorted(want)}"
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")


def _bfloat16(got: Results, want: Results, family: Family, mode: Mode) -> None:
    exact = prefill(None)(_fresh(family, REFERENCE))["output"]
    error, allowed = ((value["output"] - exact).abs().max() for value in (got, want))
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert error <= 2 * (allowed + ulp), f"bfloat16 error {error:.2e}, transformers' own {allowed:.2e}"


def _training(got: Results, want: Results, family: Family, mode: Mode) -> None:
    """The worst relative difference of a tensor, against the worst between transformers' own two."""
    eager = reference_results(family, mode, "eager")
    assert not isinstance(eager, str), eager
    error, budget = _worst(got, want), _worst(eager, want)
    ulp = 16 * torch.finfo(torch.float32).eps
    assert error <= 2 * (budget + ulp), f"differs by {error:.2e} (relative), sdpa and eager by {budget:.2e}"


def _worst(got: Results, want: Results) -> float:
    assert got.keys() == want.keys(), f"gradients of {sorted(got.keys() ^ want.keys())} on one side only"
    scale = max(float(value.abs().max()) for name, value in want.items() if name != "loss")
    return max(_difference(got[name], value, scale) for name, value in want.items())


def _difference(got: Tensor, want: Tensor, scale: float) -> float:
    """Relative to the tensor, which counts as at least a thousandth of the largest gradient."""
    return float((got - want).abs().max() / max(float(want.abs().max()), 1e-3 * scale))


JUDGES = {"close": _close, "bf16": _bfloat16, "training": _training}


# -- the page ----------------------------------------------------------------------------------------------------------

INTRO = """# Compatibility

What happens when `attn_implementation="hf_attn_<mechanism>"` meets a model family and a way of using it. Written by
`python -m tests.compatibility.write_table` from what the cells of `tests/compatibility` do with tiny random models; a
test compares this page with them. Made with transformers {version}.

Every cell runs the same thing twice: with transformers' own attention (`sdpa`, or `eager` where transformers refuses
it), and with the mechanism under options that must equal dense attention while its sparse op does the work (moba with
`top_k=1000`, streaming with `window=100000`, blocks of 4 tokens, the torch path forced). "Text model" rows give the
string to the text model alone, `attn_implementation={{"text_config": "hf_attn_moba"}}`; "plain string" rows to every
tower.

- **right**: equal, and every attention layer ran the sparse op in every call.
- **part dense**: equal; some layers or calls ran dense by design and are counted in `hf_attn.stats`; the note says why.
- **dense**: equal; every call ran dense and was counted.
- **refused**: `ValueError` that names the mechanism and what to do; the note is that message.
- **-**: not a mode of this model in transformers itself; the note says how the test found out.

No cell may be anything else: results that differ, a layer that never called, or a call that was not counted fail.
"""


def render() -> str:
    """The page, from all cells."""
    cells = {
        (mechanism, family, mode): run_cell(family, mechanism, mode)
        for mechanism in MECHANISMS
        for family in FAMILIES
        for mode in MODES
    }
    parts = [INTRO.format(version=transformers.__version__), _summary(cells), _modes()]
    for mechanism in MECHANISMS:
        parts.append(_section(mechanism, {(f, m): o for (name, f, m), o in cells.items() if name == mechanism}))
    return "\n".join(parts)


def _summary(cells: dict) -> str:
    lines = ["| mechanism | " + " | ".join(KINDS) + " | cells |", "|---" * (len(KINDS) + 2) + "|"]
    for mechanism in MECHANISMS:
        counts = Counter(outcome.kind for (name, *_), outcome in cells.items() if name == mechanism)
        row = [str(counts[kind]) for kind in KINDS]
        lines.append(f"| {mechanism} | " + " | ".join(row) + f" | {counts.total()} |")
    return f"{len(FAMILIES)} families, {len(MODES)} modes:\n\n" + "\n".join(lines) + "\n"


def _modes() -> str:
    lines = ["## Modes", ""]
    lines += [f"- **{mode.name}** ({mode.group.lower()}): {mode.about}." for mode in MODES]
    return "\n".join(lines) + "\n"


def _section(mechanism: str, cells: dict[tuple[Family, Mode], Outcome]) -> str:
    notes: dict[str, int] = {}
    parts = [f"## {mechanism}", ""]
    for group in GROUPS:
        modes = [mode for mode in MODES if mode.group == group]
        parts += [f"### {group}: {mechanism}", "", "| family | " + " | ".join(mode.name for mode in modes) + " |"]
        parts.append("|---" * (len(modes) + 1) + "|")
        for family in FAMILIES:
            row = [_cell(cells[family, mode], notes) for mode in modes]
            parts.append(f"| {family.name} | " + " | ".join(row) + " |")
        parts.append("")
    parts += [f"Notes on {mechanism}:", ""]
    parts += [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(parts) + "\n"


def _cell(outcome: Outcome, notes: dict[str, int]) -> str:
    if not outcome.why:
        return outcome.kind
    # One note for all classes and shapes.
    why = re.sub(r"\b[A-Z]\w*(Attention|ForConditionalGeneration)\w*", "<class>", outcome.why)
    why = re.sub(r"\([\d, ]+\)", "(...)", why)
    return f"{outcome.kind} ({notes.setdefault(why, len(notes) + 1)})"
