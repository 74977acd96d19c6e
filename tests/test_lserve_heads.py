"""Classes of heads: from gates, from DuoAttention's folders, in configs; and the example that uses them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_attn
from hf_attn import LServeConfig, classify_heads, load_duo_heads
from tests.integrations.transformers.tiny import build

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.51, 0.9, 1.0])
def test_count_and_threshold(sparsity):
    alpha = torch.rand(7, 5, generator=torch.Generator().manual_seed(3))
    retrieval = classify_heads(alpha, sparsity)
    streaming = 0 if sparsity == 0 else 35 if sparsity == 1 else math.ceil(34 * sparsity)
    assert int((~retrieval).sum()) == streaming
    if 0 < sparsity < 1:
        assert torch.equal(retrieval, alpha >= alpha.flatten().double().quantile(sparsity))
        assert torch.equal(retrieval, classify_heads(alpha, float(torch.tensor(sparsity))))


def test_ties_and_clipping():
    equal = classify_heads(torch.full((3, 2), 0.5), 0.5)
    assert equal.tolist() == [[False, False], [False, True], [True, True]]
    assert torch.equal(classify_heads(torch.tensor([[5.0, 1.0, 2.0]]), 0.5), torch.tensor([[False, True, True]]))


def test_bad_gates():
    for alpha, sparsity, message in (
        (torch.rand(3), 0.5, "alpha must be [layers, KV heads], got (3,)"),
        (torch.rand(3, 2), 1.5, "sparsity must lie in [0, 1], got 1.5"),
        (torch.tensor([[float("nan")]]), 0.5, "not finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            classify_heads(alpha, sparsity)


def write_duo(folder: Path, rows: list[list[float]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    (folder / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256, "lr": 0.02}))


def test_duo_folder(tmp_path):
    write_duo(tmp_path / "gates", [[0.25, 1.5], [0.75, -0.5]])
    duo = load_duo_heads(tmp_path / "gates")
    assert duo.alpha.tolist() == [[0.25, 1.0], [0.75, 0.0]] and (duo.sink_size, duo.recent_size) == (128, 256)
    model = hf_attn.apply(build("llama"), "lserve", gates=duo.alpha.tolist())
    config = LServeConfig.from_dict({k: v for k, v in model.config.hf_attn.items() if k != "mechanism"})
    assert [config.retrieval(i) for i in (0, 1)] == [(False, True), (True, False)]
    with pytest.raises(OSError):
        load_duo_heads(tmp_path / "nothing")
    write_duo(tmp_path / "ragged", [[0.25, 1.0], [0.75]])
    with pytest.raises(ValueError, match="one row a layer with equally many heads"):
        load_duo_heads(tmp_path / "ragged")
    (tmp_path / "gates" / "full_attention_heads.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match="must hold tab-separated numbers"):
        load_duo_heads(tmp_path / "gates")
    (tmp_path / "gates" / "config.json").write_text("{}")
    (tmp_path / "gates" / "full_attention_heads.tsv").write_text("1\t0\n")
    with pytest.raises(ValueError, match="must hold the integer sink_size"):
        load_duo_heads(tmp_path / "gates")


def test_kinds_of_a_config():
    """Explicit heads win over gates; without either every head retrieves unless all are to stream."""
    assert LServeConfig().retrieval(3) is None
    assert LServeConfig(static_sparsity=1.0).retrieval(3) == ()
    assert LServeConfig(gates=[[0.1, 0.9]], static_sparsity=0.0).retrieval(0) is None
    both = LServeConfig(gates=[[0.1, 0.9]] * 2, heads=[[1, 0]])
    assert both.retrieval(0) == both.retrieval(1) == (True, False)
    with pytest.raises(ValueError, match="name 2 layers, but this attention layer has the number 2"):
        LServeConfig(gates=[[0.1, 0.9], [0.2, 0.8]]).retrieval(2)


def test_scales_of_a_layer():
    """One row a layer, or one for all; a layer without a number cannot have its own."""
    scales = [[0.5, 1.0], [0.25, 2.0]]
    config = LServeConfig(kv_quant="int8-per-tensor", kv_scales=scales)
    assert [config.store_options(layer).kv_scales for layer in range(2)] == [(0.5, 1.0), (0.25, 2.0)]
    for layer in (None, 2):
        with pytest.raises(ValueError, match=f"kv_scales names 2 layers, .* has the number {layer}"):
            config.store_options(layer)
    assert LServeConfig(kv_quant="int8-per-tensor", kv_scales=scales[:1]).store_options(None).kv_scales == (0.5, 1.0)


def test_example(tiny_model, tmp_path):
    write_duo(tmp_path / "gates", [[0.9, 0.1], [0.2, 0.8]])
    command = [sys.executable, "examples/lserve_decode.py", "--model", tiny_model, "--tokens", "1200"]
    done = subprocess.run(
        [*command, "--budget", "256", "--kv-quant", "int4", "--duo-heads", str(tmp_path / "gates")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"cache of 11\d\d tokens: .*\bscales\b", done.stdout) and "pages read, density" in done.stdout
