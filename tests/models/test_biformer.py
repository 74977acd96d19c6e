"""BiFormer: exact sizes and products, regions and padding, the two layouts, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_attn import ops
from hf_attn.models.biformer import BiFormerConfig, BiFormerForImageClassification, BiFormerModel
from hf_attn.models.biformer.layers import BilevelRoutingAttention, BilevelRoutingAttentionNchw
from hf_attn.models.biformer.looking import attention_map
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


@pytest.mark.parametrize(("stage", "block", "position"), [(1, 1, (15, 3)), (3, 2, (0, 4)), (4, 1, (1, 1))])
def test_attention_map(stage, block, position):
    """The weights reproduce what the layer attends to: put a one-hot value in, and read it off."""
    model, pixels = classifier("biformer"), images(64, 128)
    weights = attention_map(model, pixels, stage=stage, block=block, position=position)
    maps = [n // 2 ** (stage + 1) for n in (64, 128)]
    assert weights.shape == (2, *maps) and float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2))
    layer = model.biformer.stages[stage - 1][block - 1].attn
    if stage == 4:
        assert (weights > 0).all()
        return
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixels)
    handle.remove()
    padded, region = layer.to_whole_regions(seen[0])
    query, key, _ = (t.unflatten(-1, (layer.num_heads, -1)) for t in layer.qkv(padded))
    count = padded.shape[1] * padded.shape[2]
    value = torch.eye(count).view(1, *padded.shape[1:3], 1, count).expand(2, -1, -1, layer.num_heads, -1)
    options = {"region_size": region, "top_k": layer.top_k, "scale": layer.scale}
    read = ops.bilevel_routing_attention(query, key, value, **options)[:, *position].mean(1)
    torch.testing.assert_close(weights, read.unflatten(-1, padded.shape[1:3])[:, : maps[0], : maps[1]])
    assert int((weights[0] > 0).sum()) <= layer.top_k * region[0] * region[1]


def test_attention_maps_that_do_not_exist():
    model = classifier("biformer")
    for options, message in (
        ({"stage": 5, "block": 1, "position": (0, 0)}, "stage=5, block=1 does not exist"),
        ({"stage": 1, "block": 2, "position": (0, 0)}, "block=2 does not exist"),
        ({"stage": 1, "block": 1, "position": (16, 0)}, r"outside the 16 x 16 map"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_map(model, images(), **options)


@pytest.mark.slow
def test_examples(tmp_path):
    """Classify an image, draw where a position looks: as a user would start them."""
    model = classifier("biformer", id2label={index: f"kind {index}" for index in range(5)})
    model.save_pretrained(tmp_path / "model")
    model.config.image_processor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    Image.effect_noise((90, 70), 60).save(tmp_path / "image.png")
    image = ["--image", str(tmp_path / "image.png"), "--model", str(tmp_path / "model")]
    picture = tmp_path / "picture.png"
    for script, options, expected in (
        ("classify_image", image, "kind "),
        ("where_a_token_looks", [*image, "--row", "3", "--output", str(picture)], "reads 64 of 256 positions"),
    ):
        command = [sys.executable, f"examples/{script}.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr[-2000:]
    assert Image.open(picture).size == (448, 448)
