"""Every system reproduces its golden file at the specification's tolerance."""

from __future__ import annotations

import fnmatch
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"
SYSTEMS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
TOLERANCES = json.loads((GOLDEN / "outputs.json").read_text())


def load_case(system: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Inputs, results and config of a golden file."""
    with safe_open(GOLDEN / f"{system}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    results = {name for name in tensors if tolerance(system, name) is not None}
    return (
        {name: t for name, t in tensors.items() if name not in results},
        {name: tensors[name] for name in results},
        config,
    )


def tolerance(system: str, name: str) -> tuple[float, float] | None:
    """(rtol, atol) of a result, None for an input."""
    for pattern, (rtol, atol) in TOLERANCES[system].items():
        if fnmatch.fnmatchcase(name, pattern):
            return rtol, atol
    return None


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "auto"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_golden(system, backend, monkeypatch):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("golden cases are CPU tensors; without a GPU they run through Triton's interpreter")
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    adapter = importlib.import_module(f"tests.parity.{system}")
    if backend == "triton" and not getattr(adapter, "HAS_TRITON", True):
        pytest.skip(f"{system} has no Triton path")
    inputs, expected, config = load_case(system)
    got = adapter.run(inputs, config)
    left_out = getattr(adapter, "NOT_YET", ())
    due = {name for name in expected if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out)}
    assert due and due <= set(got), f"results missing: {sorted(due - set(got))}"
    for name in sorted(due):
        rtol, atol = tolerance(system, name)
        torch.testing.assert_close(
            got[name].detach().to(expected[name].dtype),
            expected[name],
            rtol=rtol,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )
