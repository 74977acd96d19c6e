"""BiFormer: exact sizes and products, regions and padding, the two layouts, what it refuses."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.utils.flop_counter import FlopCounterMode

from hf_attn.models.biformer import BiFormerConfig, BiFormerForImageClassification, BiFormerModel
from hf_attn.models.biformer.layers import BilevelRoutingAttention, BilevelRoutingAttentionNchw
from tests.models.vision_families import TINY, classifier, images


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    [
        ("tiny", 13_142_760, 2.22),
        pytest.param("small", 25_536_232, 4.46, marks=pytest.mark.slow),
        pytest.param("base", 56_804_968, 9.76, marks=pytest.mark.slow),
        pytest.param("stl", 28_372_552, 4.57, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name, parameters, giga_macs):
    config = BiFormerConfig.preset(name, num_labels=1000, attn_implementation="eager")
    with torch.device("meta"):
        model = BiFormerForImageClassification(config).eval()
        assert model.num_parameters() == parameters
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, rel=0.01)


def layer(kind: str, width: int = 16, **fields) -> BilevelRoutingAttention:
    options = {"embed_dims": [width], "depths": [1], "head_dim": 8, "n_win": 4, "topks": [3], **fields}
    config = BiFormerConfig(attention_layout=kind, **options)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return (BilevelRoutingAttention if kind == "legacy" else BilevelRoutingAttentionNchw)(config, 0).eval()


def as_nchw(made: BilevelRoutingAttention) -> BilevelRoutingAttentionNchw:
    """The refactored layer with the same weights."""
    other = layer("nchw")
    names = {"qkv.qkv": "qkv_linear", "wo": "output_linear", "lepe": "lepe"}
    state = {}
    for key, value in made.state_dict().items():
        name, kind = key.rsplit(".", 1)
        state[f"{names[name]}.{kind}"] = value[..., None, None] if value.dim() == 2 else value
    other.load_state_dict(state)
    return other


def test_the_layouts_agree_where_sizes_divide():
    made = layer("legacy")
    other = as_nchw(made)
    maps = torch.randn(2, 8, 12, 16)
    torch.testing.assert_close(made(maps), other(maps), rtol=1e-5, atol=1e-5)
    ragged = torch.randn(2, 9, 13, 16)
    assert other(ragged).shape == ragged.shape and not torch.allclose(made(ragged), other(ragged), atol=1e-3)


def test_padding_goes_to_n_win_whole_regions():
    """9 positions in 4 regions are 12, not 9: the authors pad to multiples of the number of regions."""
    made = layer("legacy")
    padded, region = made.to_whole_regions(torch.ones(1, 9, 8, 16))
    assert padded.shape == (1, 12, 8, 16) and region == (3, 2) and not padded[:, 9:].any()
    fixed = layer("legacy", region_size=5)
    padded, region = fixed.to_whole_regions(torch.ones(1, 9, 11, 16))
    assert padded.shape == (1, 10, 15, 16) and region == (5, 5)


def test_reading_every_region_is_full_attention():
    made = layer("legacy", n_win=2, topks=[4])
    maps = torch.randn(2, 6, 8, 16)
    query, key, value = (t.flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2) for t in made.qkv(maps))
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=16**-0.5)
    full = full.transpose(1, 2).reshape(maps.shape)
    lepe = made.lepe(made.qkv(maps)[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(made(maps), made.wo(full + lepe), rtol=1e-5, atol=1e-5)


def test_regions_of_a_fixed_size():
    """They are as many as the image needs; a stage that reads more regions than there are says so."""
    model = classifier("biformer", region_size=2, topks=[1, 2, 4, -2])
    assert model(images(64, 96)).logits.isfinite().all()
    with pytest.raises(ValueError, match="top_k=4 must be between 1 and the 1 regions"):
        model(images(32, 32))


@pytest.mark.parametrize("layout", ["legacy", "nchw"])
@pytest.mark.parametrize("topks", [[1, 2, 4, -2], [0, -1, 4, -2]])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_options_run_and_learn(layout, topks, stem):
    torch.manual_seed(0)
    fields = {**TINY["biformer"], "topks": topks, "attention_layout": layout, "stem": stem}
    config = BiFormerConfig(**fields, layer_scale_init_value=0.1, before_attn_dwconv=0 if stem == "patch" else 3)
    model = BiFormerForImageClassification(config)
    block = model.biformer.stages[0][0]
    assert torch.equal(block.gamma1, torch.full_like(block.gamma1, 0.1))
    model(images(65, 70), labels=torch.tensor([0, 1])).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle


def test_routing_is_a_constant():
    made = layer("legacy").double()
    maps = torch.randn(1, 8, 8, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (maps,), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topks": [50, 4, 16, -2]}, r"topks\[0\]=50 exceeds the n_win\^2 = 49"),
        ({"topks": [-3, 4, 16, -2]}, r"topks\[0\]=-3 is unknown"),
        ({"topks": [1, 4]}, "topks has 2 entries"),
        ({"head_dim": 48}, r"embed_dims\[0\]=64 must be a multiple of head_dim=48"),
        ({"qk_dims": [63, 128, 256, 512]}, "query width 63"),
        ({"embed_dims": [64, 128, 256, 500]}, r"embed_dims\[3\]=500 must be a multiple of 8"),
        ({"stem": "linear"}, "stem='linear'"),
        ({"attention_layout": "nhwc"}, "attention_layout='nhwc'"),
        ({"side_dwconv": 4}, "side_dwconv=4 must be odd"),
        ({"n_win": 0}, "n_win=0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        BiFormerConfig(**fields)


def test_maps_that_do_not_divide():
    model = BiFormerModel(BiFormerConfig(**TINY["biformer"], auto_pad=False)).eval()
    assert model(images(64, 64)).last_hidden_state.shape == (2, 48, 2, 2)
    with pytest.raises(ValueError, match="a map of 17 x 16 does not divide by n_win=2"):
        model(images(68, 64))
    ragged = layer("nchw")
    with pytest.raises(ValueError, match="fewer tokens a side than n_win=4"):
        ragged(torch.randn(1, 3, 8, 16))
