"""The front door: what importing does, what it offers, and mechanisms of third parties."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import hf_attn
from hf_attn.mechanism import get_mechanism
from tests.integrations.transformers.tiny import EXACT, build, tokens

IMPORT = """
import gc, sys, time

gc.disable()  # a collection of the host libraries' heap takes longer than our import
import transformers.modeling_utils, transformers.masking_utils
before, start = set(sys.modules), time.process_time()
import hf_attn
seconds, loaded = time.process_time() - start, set(sys.modules) - before
from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig
heavy = [m for m in loaded if m.split(".")[0] in ("triton", "diffusers", "peft", "accelerate", "typer", "matplotlib")]
bodies = [m for m in loaded if m.startswith(("hf_attn.mechanisms.", "hf_attn.ops", "hf_attn.front"))]
assert seconds < 0.3, seconds
assert not heavy and not bodies, (heavy, bodies)
assert "hf_attn_moba" in AttentionInterface().valid_keys() and PreTrainedConfig().hf_attn is None
"""


def test_import_is_light():
    # Three tries: the first import of a clone compiles the files, and a busy machine makes every second a long one.
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
        if run.returncode == 0:
            break
    assert run.returncode == 0, run.stderr


def test_every_public_name_exists():
    for name in [*hf_attn.__all__, "__version__"]:
        assert getattr(hf_attn, name) is not None and name in dir(hf_attn)
    with pytest.raises(AttributeError, match="has no attribute 'applied'"):
        _ = hf_attn.applied


def test_list_mechanisms():
    rows = hf_attn.list_mechanisms()
    by_name = {row["name"]: row for row in json.loads(json.dumps(rows))}
    assert {"exact", "moba", "streaming"} <= set(by_name)
    assert by_name["moba"]["capabilities"]["train"] is True and by_name["moba"]["source"]
    lines = str(rows).splitlines()
    assert len(lines) == len(rows) + 1 and lines[0].startswith("name")


def test_third_party_mechanism():
    mine = dataclasses.replace(EXACT, name="mine")
    assert hf_attn.register_mechanism(mine) is mine and hf_attn.register_mechanism(mine) is mine
    try:
        model = hf_attn.apply(build("llama"), "mine", block_size=2)
        with torch.no_grad():
            model(tokens(1, 5))
        assert hf_attn.stats(model)["mechanism"] == "mine" and get_mechanism("mine") is mine
    finally:
        hf_attn.unregister_mechanism("mine")
    with pytest.raises(ValueError, match="unknown mechanism 'mine'"):
        get_mechanism("mine")
    with pytest.raises(ValueError, match="hf_attn_mine"):
        build("llama", "hf_attn_mine")


def test_names_that_cannot_be_registered():
    with pytest.raises(ValueError, match="a mechanism called 'moba' exists already"):
        hf_attn.register_mechanism(dataclasses.replace(EXACT, name="moba"))
    for name in ("my_flash", "sdpa2", "a/b", "Upper", ""):
        with pytest.raises(ValueError, match="cannot be registered with transformers"):
            hf_attn.register_mechanism(dataclasses.replace(EXACT, name=name))
    with pytest.raises(ValueError, match="was not added by register_mechanism"):
        hf_attn.unregister_mechanism("moba")
    with pytest.raises(TypeError, match="takes a hf_attn.Mechanism, got str"):
        hf_attn.register_mechanism("moba")
