"""Vision backbones on the Hub: pushed, loaded again as classifier and as backbone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loopback_hub import run_python
from tests.models.vision_families import FAMILIES

CODE = """
import sys

import pytest
sys.path.insert(0, {root!r})
import torch
from transformers import AutoBackbone, AutoImageProcessor, AutoModelForImageClassification
from tests.models.vision_families import FAMILIES, classifier, images
pixels = images()
for family in FAMILIES:
    model = classifier(family)
    model.push_to_hub("me/" + family)
    model.config.image_processor(size={{"shortest_edge": 64}}).push_to_hub("me/" + family)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
        loaded = AutoModelForImageClassification.from_pretrained("me/" + family)
        assert torch.equal(loaded(pixels).logits, expected.logits), family
        backbone = AutoBackbone.from_pretrained("me/" + family, out_features=["stem", "stage3"]).eval()
        assert torch.equal(backbone(pixels).feature_maps[0], expected.hidden_states[0]), family
    assert AutoImageProcessor.from_pretrained("me/" + family).size["shortest_edge"] == 64
print("all loaded")
"""


@pytest.mark.slow
def test_round_trip(loopback):
    hub, environment = loopback
    root = str(Path(__file__).resolve().parents[2])
    assert run_python(CODE.format(root=root), environment).strip().endswith("all loaded")
    for family in FAMILIES:
        assert {"config.json", "model.safetensors", "modeling_hf_attn.py"} <= set(hub.repos[f"me/{family}"].files)
