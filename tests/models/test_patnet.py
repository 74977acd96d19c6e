"""PATNet: exact sizes and products, distance buckets, statistics, folding, dropout, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.utils.flop_counter import FlopCounterMode

from hf_attn.models.patnet import PatNetConfig, PatNetForImageClassification
from hf_attn.models.patnet.layers import ChannelGate, SelfAttention, distance_buckets
from tests.models.vision_families import classifier, images, stir

SIZES = {
    # name: parameters and 10^9 products, without and with spatial gates
    "t0": (3_486_160, 3_558_240, 0.233, 0.243),
    "t1": (5_985_552, 6_144_552, 0.517, 0.540),
    "t2": (12_269_816, 12_650_424, 1.033, 1.078),
    "s": (28_013_304, 28_975_704, 2.705, 2.828),
    "m": (59_179_000, 61_366_776, 6.673, 6.996),
    "l": (100_641_336, 104_465_336, 11.882, 12.466),
}


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(
    "name", ["t0", *(pytest.param(name, marks=pytest.mark.slow) for name in SIZES if name != "t0")]
)
def test_published_sizes(name, spatial):
    options = {"num_labels": 1000, "use_spatial_attn": spatial, "attn_implementation": "eager"}
    with torch.device("meta"):
        model = PatNetForImageClassification(PatNetConfig.preset(name, **options)).eval()
        assert model.num_parameters() == SIZES[name][spatial]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(SIZES[name][2 + spatial], rel=0.01)


def test_six_heads_have_162_parameters_more_a_block():
    counts = []
    for heads in (4, 6):
        with torch.device("meta"):
            config = PatNetConfig.preset("t2", num_labels=1000, num_attention_heads=heads)
            counts.append(PatNetForImageClassification(config).num_parameters())
    assert counts[1] - counts[0] == 162 * 4


@pytest.mark.parametrize(("height", "width"), [(30, 3), (7, 7), (1, 1), (2, 170)])
def test_buckets(height, width):
    found = distance_buckets(height, width, 20)
    places = [(y, x) for y in range(height) for x in range(width)]
    for i in range(0, len(places), 7):
        for j in range(len(places)):
            distance = round(math.hypot(places[i][0] - places[j][0], places[i][1] - places[j][1]))
            far = min(round(20 + math.log(max(distance, 1) / 20) / math.log(8) * 20), 40)
            assert found[i, j] == (distance if distance <= 20 else far), (i, j)
    assert torch.equal(found, found.T) and int(found.max()) <= 40
    if height > 1 < width:
        # Moving both positions changes nothing.
        grid = found.view(height, width, height, width)
        assert torch.equal(grid[1:, 1:, 1:, 1:], grid[:-1, :-1, :-1, :-1])


def test_statistics_are_those_of_torch():
    gate = ChannelGate(6).double().eval()
    stir(gate)
    maps = torch.randn(3, 6, 4, 5, dtype=torch.float64) * 3 + 50
    flat = maps.flatten(2)
    stacked = torch.stack([flat.mean(-1), flat.std(-1)], -1)[:, :, None]
    expected = torch.nn.functional.hardsigmoid(gate.bn(gate.cfc1(stacked)))
    torch.testing.assert_close(gate(maps), expected, rtol=1e-10, atol=1e-10)
    constant = torch.ones(1, 6, 3, 3, dtype=torch.float64)
    assert gate(constant).isfinite().all()
    with pytest.raises(ValueError, match="no standard deviation"):
        gate(torch.randn(2, 6, 1, 1, dtype=torch.float64))


def test_a_constant_map_has_finite_gradients():
    """The deviation of a blank image is 0, where a square root has no slope."""
    model = classifier("patnet").train()
    model(torch.zeros(4, 3, 64, 64), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("channel", [False, True])
def test_folding(spatial, channel):
    torch.manual_seed(0)
    fields = {"embed_dim": 16, "depths": [1, 1, 2, 1], "feature_dim": 32, "num_labels": 5}
    config = PatNetConfig(**fields, use_spatial_attn=spatial, use_channel_attn=channel, layer_scale_init_value=0.5)
    model = PatNetForImageClassification(config).eval()
    stir(model)
    expected, before = model(images()).logits.detach(), model.num_parameters()
    found = model.reparameterize()(images()).logits.detach()
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with torch.inference_mode():
        # Without gradients the gates work in place.
        torch.testing.assert_close(model(images()).logits, found, rtol=1e-6, atol=1e-6)
    assert model.num_parameters() < before
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_dropout_only_in_training():
    config = PatNetConfig(attention_dropout=0.5)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    layer, maps = SelfAttention(config, 24), torch.randn(2, 24, 3, 5)
    assert not torch.equal(layer(maps), layer(maps))
    layer.eval()
    assert torch.equal(layer(maps), layer(maps))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "multiple of num_attention_heads=5"),
        ({"n_div": 1}, "n_div=1"),
        ({"embed_dim": 2}, "embed_dim=2"),
        ({"rpe_ratio": 0}, "rpe_ratio=0"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        PatNetConfig(**fields)
