"""OverLoCK: sizes, products, reparameterisation, window mixing, official names, round trips and what it refuses."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_attn.models.overlock import ContMixBlock, OverlockConfig, OverlockForImageClassification
from hf_attn.models.overlock.contmix import working_size
from hf_attn.models.overlock.mixing import mix_windows, window_bias
from hf_attn.models.overlock.reparam import BRANCHES, OverlockDilatedReparam
from tests.budget import assert_as_good_as_eager
from tests.models import vision_families as common

SIZES = {**common.TINY["overlock"], "num_labels": 5}


def tiny(**options) -> OverlockForImageClassification:
    return common.classifier("overlock", **options)


def maps(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


COUNTS = {
    "xt": (17_307_272, 16_969_600, 16_791_384),
    "t": (34_990_472, 34_476_448, 33_981_064),
    "s": (58_309_772, 57_795_748, 56_670_476),
    "b": (98_012_968, 97_434_816, 95_520_680),
}


@pytest.mark.parametrize("name", ["xt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t", "s", "b"))])
def test_presets_have_the_published_sizes(name):
    found = []
    for options in ({}, {"use_aux_head": False}, {"deploy": True}):
        with torch.device("meta"):
            model = OverlockForImageClassification(OverlockConfig.preset(name, num_labels=1000, **options))
        found.append(sum(p.numel() for p in model.parameters()))
    assert tuple(found) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("xt", 2.70),
        ("t", 5.65),
        pytest.param("s", 9.89, marks=pytest.mark.slow),
        pytest.param("b", 17.10, marks=pytest.mark.slow),
    ],
)
def test_presets_have_the_published_products(name, billions):
    config, saved = OverlockConfig.preset(name, num_labels=1000, deploy=True), 0
    # The linear map over 49 affinities is applied to the 49 keys instead of to every query.
    for stage, tokens in ((2, 14**2), (3, 7**2)):
        heads, outputs = 2 * config.sub_num_heads[stage - 2], config.kernel_sizes[stage] ** 2 + config.smk_size**2
        dim = config.embed_dims[stage] // (2 * heads)
        plain, folded = tokens * 49 * (dim + outputs), (tokens + 49) * dim * outputs
        saved += config.sub_depths[stage - 2] * heads * (plain - folded)
    found = common.macs(lambda: OverlockForImageClassification(config), 224)
    assert found + saved / 1e9 == pytest.approx(billions, rel=0.005)


def convolution_norm(name: str) -> set[str]:
    return {f"{name}.0.weight"} | norm(f"{name}.1")


def norm(name: str) -> set[str]:
    return {f"{name}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def both(*names: str) -> set[str]:
    return {f"{name}.{x}" for name in names for x in ("weight", "bias")}


def large_kernel(name: str, kernel: int) -> set[str]:
    found = {f"{name}.lk_origin.weight"} | norm(f"{name}.origin_bn")
    for size, dilation in BRANCHES[kernel]:
        found |= {f"{name}.dil_conv_k{size}_{dilation}.weight"} | norm(f"{name}.dil_bn_k{size}_{dilation}")
    return found


def official_names(config: OverlockConfig) -> set[str]:
    """Names in a state dict of the authors' code, written out from their class definitions."""
    names = both("high_level_proj", "head.4", "aux_head.2") | convolution_norm("head") | norm("aux_head.0")
    names |= convolution_norm("patch_embedx.x_proj") | convolution_norm("patch_embedx.h_proj")
    for index in (0, 3, 6, 9):
        names |= {f"patch_embed1.{index}.weight"} | norm(f"patch_embed1.{index + 1}")
    for stage, depth in enumerate(config.depths):
        names |= convolution_norm(f"patch_embed{stage + 1}") if stage else set()
        for j in range(depth):
            block = f"blocks{stage + 1}.{j}"
            names |= both(*(f"{block}.{x}" for x in ("dwconv", "proj.0", "proj.4", "proj.6", "proj.8")))
            names |= both(f"{block}.proj.3.proj.1", f"{block}.proj.3.proj.3") | norm(f"{block}.proj.2")
            names |= {f"{block}.proj.7.gamma", f"{block}.proj.7.beta"}
            names |= large_kernel(f"{block}.proj.1", config.kernel_sizes[stage])
            names |= both(f"{block}.ls") if config.ls_init_values[stage] is not None else set()
    for part, depth in enumerate(config.sub_depths):
        for j in range(depth):
            block = f"sub_blocks{part + 3}.{j}"
            plain = (
                "dwconv1",
                "dwconv2",
                "norm1",
                "norm2",
                "fusion.0",
                "fusion.3",
                "weight_proj",
                "proj.1",
                "ls1",
                "ls2",
            )
            plain += ("se_layer.proj.1", "se_layer.proj.3", "mlp.0", "mlp.2", "mlp.4")
            plain += ("x_scale", "h_scale") if part or j else ()
            names |= both(*(f"{block}.{x}" for x in plain))
            names |= {
                f"{block}.{x}" for x in ("rpb1", "rpb2", "fusion.4.gamma", "fusion.4.beta", "mlp.3.gamma", "mlp.3.beta")
            }
            names |= set().union(*(convolution_norm(f"{block}.{x}") for x in ("weight_query", "dyconv_proj", "gate")))
            names |= {f"{block}.weight_key.1.weight"} | norm(f"{block}.weight_key.2")
            names |= norm(f"{block}.proj.0") | norm(f"{block}.fusion.1") | norm(f"{block}.lepe.1")
            names |= large_kernel(f"{block}.lepe.0", config.kernel_sizes[part + 2])
    return names


def test_official_weights_load_strictly():
    model = tiny()
    ours = {name.removeprefix("overlock."): tensor for name, tensor in model.state_dict().items()}
    assert set(ours) == official_names(model.config)
    fresh = OverlockForImageClassification(model.config).eval().load_official_weights({"model": ours})
    images = common.images(rows=1)
    with torch.no_grad():
        assert torch.equal(fresh(images).logits, model(images).logits)
    other = OverlockForImageClassification(OverlockConfig(**{**SIZES, "sub_depths": [3, 1]}))
    with pytest.raises(ValueError, match=r"missing.*sub_blocks3\.2"):
        other.load_official_weights(ours)
    without = OverlockForImageClassification(OverlockConfig(**{**SIZES, "use_aux_head": False})).eval()
    with torch.no_grad():
        assert torch.equal(without.load_official_weights(ours)(images).logits, model(images).logits)


def test_a_backbone_reads_official_norms():
    from hf_attn.models.overlock.modeling_overlock import OverlockBackbone

    backbone = OverlockBackbone(OverlockConfig(**SIZES, out_features=["stage1", "stage2", "stage3", "stage4"])).eval()
    state = {name.removeprefix("overlock."): tensor for name, tensor in tiny().state_dict().items()}
    for index, channels in enumerate(backbone.channels):
        state |= {f"extra_norm.{index}.weight": torch.rand(channels), f"extra_norm.{index}.bias": torch.rand(channels)}
    backbone.load_official_weights(state)
    assert torch.equal(backbone.hidden_states_norms["stage3"].bias, state["extra_norm.2.bias"])
    assert backbone.channels == [8, 16, 32, 40]


@torch.no_grad()
def test_reparameterisation(tmp_path):
    model, images = tiny(), common.images(96, 64)
    before, count = model(images).logits, model.num_parameters()
    with pytest.raises(RuntimeError, match="eval"):
        model.train().reparameterize()
    assert model.eval().reparameterize() is model and model.config.deploy
    small = model.num_parameters()
    after = model(images).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max() and small < count
    model.reparameterize()
    assert model.num_parameters() == small and torch.equal(model(images).logits, after)
    model.save_pretrained(tmp_path)
    loaded = OverlockForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).logits, after)
    with pytest.warns(UserWarning, match="reparameterised and in training mode"):
        model.train()(images)


@pytest.mark.parametrize("kernel", BRANCHES)
def test_merged_kernel_equals_its_branches(kernel):
    layer = OverlockDilatedReparam(3, kernel).double().eval()
    common.stir(layer)
    hidden = maps(2, 9, 11, 3).double()
    found, grads = [], []
    for branches in (False, True):
        inputs = hidden.clone().requires_grad_()
        layer.zero_grad()
        # Branches with running statistics: what training runs, without its batch statistics.
        layer.training = branches
        out = layer(inputs)
        out.square().sum().backward()
        found.append(out.detach())
        grads.append([inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)
    for merged, plain in zip(*grads, strict=True):
        torch.testing.assert_close(merged, plain, rtol=1e-9, atol=1e-9)
    layer.training = False
    layer.reparameterize()
    torch.testing.assert_close(layer(hidden), found[1], rtol=1e-11, atol=1e-11)


def by_windows(weights, values, kernel):
    """The definition, one query after the other."""
    out = torch.empty_like(values)
    height, width = values.shape[2:4]
    for i, j in itertools.product(range(height), range(width)):
        top, left = (min(max(x - kernel // 2, 0), size - kernel) for x, size in ((i, height), (j, width)))
        window = values[:, :, top : top + kernel, left : left + kernel].flatten(2, 3)
        out[:, :, i, j] = (weights[:, :, i, j, :, None] * window).sum(2)
    return out


@pytest.mark.parametrize("backend", ["auto", "tiled", "dense"])
@pytest.mark.parametrize(
    ("height", "width", "kernel"), [(3, 3, 3), (4, 7, 3), (14, 14, 13), (11, 5, 5), (9, 17, 7), (1, 6, 1), (23, 6, 5)]
)
def test_mixing(height, width, kernel, backend):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, height, width, kernel**2, generator=generator)
    values = torch.randn(2, 3, height, width, 4, generator=generator)
    single, plain = ([x.clone().requires_grad_() for x in (weights, values)] for _ in range(2))
    exact = [x.double().requires_grad_() for x in (weights, values)]
    outs = [mix_windows(*single, kernel, backend), by_windows(*plain, kernel), by_windows(*exact, kernel)]
    assert_as_good_as_eager(*outs, slack=4.0, what="out")
    for out in outs:
        out.square().sum().backward()
    for found, eager, oracle in zip(single, plain, exact, strict=True):
        assert_as_good_as_eager(found.grad, eager.grad, oracle.grad, slack=4.0)


def test_bias_is_that_of_neighborhood_attention():
    table = torch.arange(2 * 5 * 5.0).view(2, 5, 5)
    found = window_bias(table, 4, 6)
    for i, j, a, b in itertools.product(range(4), range(6), range(3), range(3)):
        row, column = min(max(i - 1, 0), 1) + a, min(max(j - 1, 0), 3) + b
        assert torch.equal(found[:, i, j, a, b], table[:, row - i + 2, column - j + 2])


def test_size_of_small_maps():
    assert working_size(6, 8, 7) == (7, 9)
    assert working_size(8, 6, 7) == (9, 7)
    assert working_size(2, 2, 13) == (13, 13)
    # Left to right in floating point, as the authors' code: 7 / 3 * 6 is 14.0, 13 / 9 * 11 is 15.888...
    assert working_size(3, 6, 7) == (7, 14) and working_size(9, 11, 13) == (13, 15)


@torch.no_grad()
def test_backends_agree():
    images = common.images(160, 192, rows=1)
    found = [tiny(na_backend=backend)(images).logits for backend in ("auto", "tiled", "dense")]
    scale = float(found[0].abs().max())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5 * scale)


def test_aux_head():
    model, images, labels = tiny(), common.images(), torch.tensor([0, 4])
    with torch.no_grad():
        assert model(images).aux_logits is None
        asked = model(images, labels=labels, output_aux_logits=True)
        assert asked.aux_logits.shape == (2, 5)
        cross_entropy = torch.nn.functional.cross_entropy
        torch.testing.assert_close(asked.loss, cross_entropy(asked.logits, labels))
        trained = model.train()(images, labels=labels)
        both_losses = [cross_entropy(x, labels) for x in (trained.logits, trained.aux_logits)]
        torch.testing.assert_close(trained.loss, both_losses[0] + 0.4 * both_losses[1])


def test_initialisation():
    model = OverlockForImageClassification(OverlockConfig(**SIZES))
    for name, weight in model.named_parameters():
        if name.endswith(("gamma", "beta", "rpb1", "rpb2")) or name.endswith("conv1.bias"):
            assert not weight.any(), name
        elif name.endswith(("ls1.weight", "x_scale.weight")):
            assert bool((weight == 1).all()), name
    assert float(model.head[0].weight.std()) == pytest.approx(0.02, rel=0.1)


def test_plug_in_block_takes_any_map():
    block = ContMixBlock(16, kernel=7, num_heads=2, ls_init_value=1.0).eval()
    with torch.no_grad():
        for size in ((7, 7), (3, 12), (20, 9)):
            hidden = maps(1, *size, 16)
            assert block(hidden).shape == hidden.shape
    assert 0.01 < float(block.rpb2.detach().std()) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_sizes": [9, 7, 6, 5]}, r"kernel_sizes\[2\]=6"),
        ({"kernel_sizes": [9, 7, 3, 5]}, r"kernel_sizes\[2\]=3"),
        ({"embed_dims": [8, 16, 20, 32]}, r"embed_dims\[2\]=20"),
        ({"smk_size": 7}, "smk_size=7"),
        ({"smk_size": 4}, "smk_size=4"),
        ({"depths": [1, 1, 1]}, "depths must have 4"),
        ({"na_backend": "natten"}, "na_backend"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        OverlockForImageClassification(OverlockConfig(**{**SIZES, **change}))


def test_bad_blocks():
    for options, message in (
        ({"kernel": 6}, "kernel=6"),
        ({"num_heads": 3}, "dim=16"),
        ({"small_kernel": 9}, "small_kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            ContMixBlock(16, **options)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny()
        model(common.images())
        model.train()(common.images())
