"""EMOv2: sizes, products, windows, official names, round trips and what it refuses."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from hf_attn.models.emov2 import EMOv2Config, EMOv2ForImageClassification
from hf_attn.models.emov2.layers import EMOv2AttentionExpansion, EMOv2Block
from tests.models import vision_families as common

SIZES = {**common.TINY["emov2"], "num_labels": 5}


def tiny(**options) -> EMOv2ForImageClassification:
    return common.classifier("emov2", **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("1m", 1_460_844),
        ("2m", 2_384_312),
        ("5m", 5_126_440),
        ("5m-512", 5_126_440),
        ("20m", 20_195_208),
        ("50m", 49_815_560),
        ("v1-1m", 1_454_316),
        ("v1-2m", 2_374_840),
        ("v1-5m", 5_110_312),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = EMOv2ForImageClassification(EMOv2Config.preset(name, num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [("1m", 224, 0.280), ("2m", 224, 0.481), ("5m", 224, 1.025), ("20m", 224, 3.997), ("5m-512", 512, 5.573)],
)
def test_presets_have_the_published_products(name, size, billions):
    config = EMOv2Config.preset(name, num_labels=1000)
    # The last map is one window at 224 pixels: both branches are equal there, and only one of them is computed.
    width, blocks = config.embed_dims[3], (config.depths[3] - 1) * (size == 224)
    saved = blocks * 49**2 * (width + int(width * config.expand_ratios[3])) / 1e9
    found = common.macs(lambda: EMOv2ForImageClassification(config), size)
    assert found + saved == pytest.approx(billions, rel=0.003)


def official_names(depths, expansions) -> set[str]:
    """Names in a state dict of the authors' code, written out from their class definitions."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"stage0.0.conv.weight", "stage0.0.conv.bias", "stage0.1.conv.weight", "stage0.2.conv.weight"}
    names |= {f"stage0.{i}.norm.{x}" for i in (0, 1) for x in norm}
    names |= {"norm.norm.weight", "norm.norm.bias", "head.weight", "head.bias"}
    for stage, (depth, attention) in enumerate(zip(depths, expansions, strict=True), 1):
        for j in range(depth):
            block = {f"conv_local.norm.{x}" for x in norm} | {"conv_local.conv.weight", "proj.conv.weight", "ls.gamma"}
            block |= {f"norm.{x}" for x in norm} if stage < 3 else {"norm.norm.weight", "norm.norm.bias"}
            parts = ("qk", "v") if attention and j else ("net",)
            block |= {f"eops.0.{part}.conv.{x}" for part in parts for x in ("weight", "bias")}
            names |= {f"stage{stage}.{j}.{name}" for name in block}
    return names


def test_official_weights_load_strictly():
    model = tiny()
    ours = {k.removeprefix("emov2.").replace("classifier", "head"): v for k, v in model.state_dict().items()}
    assert set(ours) == official_names(SIZES["depths"], (False, False, True, True))
    fresh = EMOv2ForImageClassification(model.config).eval()
    fresh.load_official_weights({"state_dict": {f"module.{name}": tensor for name, tensor in ours.items()}})
    images = common.images(rows=1)
    with torch.no_grad():
        assert torch.equal(fresh(images).logits, model(images).logits)
    other = EMOv2ForImageClassification(EMOv2Config(**{**SIZES, "depths": [1, 2, 3, 2]}))
    with pytest.raises(ValueError, match=r"missing.*stage3\.2"):
        other.load_official_weights(ours)
    wider = EMOv2ForImageClassification(EMOv2Config(**{**SIZES, "embed_dims": [16, 16, 32, 64]}))
    with pytest.raises(ValueError, match="other shape"):
        wider.load_official_weights(ours)


@pytest.mark.parametrize("value", [1e-6, 0.5])
def test_layer_scale_starts_where_the_config_says(value):
    model = EMOv2ForImageClassification(EMOv2Config(**{**SIZES, "layer_scale_init_value": value}))
    gammas = [p for name, p in model.named_parameters() if name.endswith("ls.gamma")]
    assert len(gammas) == sum(SIZES["depths"]) and all(bool((gamma == value).all()) for gamma in gammas)


def maps(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def expansion(mode: str, window: int) -> EMOv2AttentionExpansion:
    torch.manual_seed(0)
    layer = EMOv2AttentionExpansion(16, 24, "gelu", True, head_dim=8, window=window, mode=mode)
    common.stir(layer)
    return layer


@torch.no_grad()
def test_windows_by_stage():
    """A list of windows, 0 among them; sizes that need padding and sizes that do not."""
    model = tiny(window_size=[7, 7, 0, 3], expand_ops=["close", "remote", "hybrid", "hybrid"])
    for height, width in ((32, 32), (96, 64), (40, 150)):
        assert model(common.images(height, width, rows=1)).logits.isfinite().all()


@torch.no_grad()
def test_hybrid_is_the_sum_of_close_and_remote():
    hidden = maps(2, 6, 9, 16)
    close, remote, hybrid = (expansion(mode, 3)(hidden) for mode in ("close", "remote", "hybrid"))
    torch.testing.assert_close(hybrid, close + remote, rtol=1e-6, atol=1e-6)
    assert (close - remote).abs().max() > 1e-3


@torch.no_grad()
def test_padded_tokens_are_keys():
    """Zeros before the projections: their keys are the bias. Masking them gives something else."""
    layer, hidden = expansion("close", 4), maps(1, 3, 4, 16)
    padded = pad(hidden, (0, 0, 0, 1))
    query, key = layer.qk(padded).chunk(2, 1)
    heads = [x.flatten(2).unflatten(1, (2, -1)).mT for x in (query, key, layer.v(padded))]
    real = torch.arange(16) < 12
    found = layer(hidden).flatten(2)
    seen, masked = (
        scaled_dot_product_attention(*heads, attn_mask=mask, scale=8**-0.5)[:, :, :12].mT.flatten(1, 2)
        for mask in (None, real[None, None, None])
    )
    torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-6)
    assert (found - masked).abs().max() > 1e-3


def test_blocks_without_skip_have_no_stochastic_depth():
    block = EMOv2Block(8, 8, expand_ratio=2, stride=2, drop_path=0.9).train()
    hidden = maps(64, 4, 4, 8)
    assert bool(block(hidden).flatten(1).any(1).all())
    dropped = EMOv2Block(8, 8, expand_ratio=2, drop_path=0.9).train()
    assert (dropped(hidden) == hidden).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dims": [8, 8, 12, 16]}, "head_dim=12"),
        ({"expand_ratios": [2, 2, 1.53125, 2]}, "value channels"),
        ({"depths": [2, 2, 2]}, "embed_dims has 4 entries"),
        ({"expand_ops": ["conv", "conv", "both", "hybrid"]}, "expand_ops"),
        ({"kernel_sizes": [5, 5, 4, 5]}, "kernel_sizes"),
        ({"norm_types": ["bn", "bn", "gn", "ln"]}, "norm_types"),
        ({"window_size": [7, 7]}, "window_size"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        EMOv2ForImageClassification(EMOv2Config(**{**SIZES, **change}))


def test_the_backbone_has_no_weights_of_its_own():
    from hf_attn.models.emov2.modeling_emov2 import EMOv2Backbone

    backbone = EMOv2Backbone(EMOv2Config(**SIZES, out_features=["stage1", "stage4"]))
    assert all(isinstance(norm, nn.Identity) for norm in backbone.hidden_states_norms.values())
