"""LaMamba-Diff: counts, initial state, sizes, cost, options, training, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from hf_attn import LaMambaDiffTransformer2DModel
from hf_attn.integrations.hub.scan_kernels import scan_of
from hf_attn.models.lamamba_diff import VARIANTS, load_official
from hf_attn.models.lamamba_diff.layers import LaMambaBlock
from hf_attn.models.lamamba_diff.paths import collect, scan_paths, spread

SMALL = {
    "sample_size": 8, "num_classes": 5, "base_channels": 8, "num_heads": 2, "window_size": 4, "ssm_state_size": 2,
    "depths": [2, 1, 1, 1], "bottleneck_depth": 1,
}  # fmt: skip
MILLIONS = {"S": 35.3, "B": 136, "L": 478, "XL": 659.7, "XL-n1": 652.5, "XL-figure": 371.6}


def tiny(seed: int = 0, **options) -> LaMambaDiffTransformer2DModel:
    """A small model with random weights everywhere, gates included."""
    torch.manual_seed(seed)
    model = LaMambaDiffTransformer2DModel(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modulation" in name:
                weight.normal_(0, 0.1)
    return model


def run(model, side=None, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = side or model.config.sample_size
    x = torch.randn(batch, model.config.in_channels, side, side, generator=generator).to(model.dtype)
    labels = torch.arange(batch) % (model.config.num_classes + 1)
    return model(x, torch.tensor([10.0, 803.0])[:batch], labels).sample


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    """Item 3, on the meta device."""
    with torch.device("meta"):
        model = LaMambaDiffTransformer2DModel(**VARIANTS[name])
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], abs=0.1 if MILLIONS[name] > 600 else 0.5)


@pytest.mark.parametrize("side", [2, 4, 6, 16])
def test_paths_are_continuous_and_cover_everything(side):
    for path in scan_paths(side):
        assert path.sort().values.tolist() == list(range(side * side))
        rows, columns = path // side, path % side
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()
    raster = scan_paths(4, continuous=False)
    assert raster[0].tolist() == list(range(16)) and raster[1, :5].tolist() == [0, 4, 8, 12, 1]
    assert torch.equal(raster[2:], raster[:2].flip(1))


@pytest.mark.parametrize("continuous", [True, False])
def test_moving_to_the_paths_and_back(continuous):
    features = torch.randn(2, 36, 3, dtype=torch.float64, requires_grad=True)
    moved = spread(features, 6, continuous)
    assert torch.equal(moved, features[:, scan_paths(6, continuous)])
    torch.testing.assert_close(collect(moved, 6, continuous), 4 * features)
    weight = torch.randn(2, 4, 36, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread(x, 6, continuous), features)
    assert torch.autograd.gradcheck(lambda x: collect(x, 6, continuous), weight)


@torch.no_grad()
def test_blocks_start_as_the_identity():
    """Item 4."""
    torch.manual_seed(0)
    model = LaMambaDiffTransformer2DModel(**SMALL).eval()
    before = run(model)
    for name, weight in model.named_parameters():
        if any(f".{part}." in name for part in ("ssm", "attn", "mlp")):
            weight.normal_()
    assert torch.equal(run(model), before) and before.abs().max() > 0.1


def test_other_sizes_use_the_same_weights():
    """Item 5: a model made for 32 at 16, 32 and 64; its own side is not interpolated."""
    model = tiny(sample_size=32, window_size=8)
    with torch.no_grad():
        for side in (16, 32, 64):
            out = run(model, side)
            assert out.shape == (2, 8, side, side) and out.isfinite().all()
        other = LaMambaDiffTransformer2DModel(**{**SMALL, "sample_size": 64, "window_size": 8})
        weights = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
        missing = other.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["pos_embed"] and not missing.unexpected_keys


def test_windows_smaller_than_their_table():
    """Full attention over a smaller map reads the middle of the table: a crop of the bias of the larger one."""
    block = tiny(sample_size=16, window_size=8).encoder[0][0].attn
    whole = block._bias(8).view(2, 8, 8, 8, 8)
    assert torch.equal(block._bias(4).view(2, 4, 4, 4, 4), whole[:, 2:6, 2:6, 2:6, 2:6])


def test_attention_stays_in_its_window():
    """Without a shift a position sees its window; with one, the shifted window, and nothing across the border."""
    torch.manual_seed(0)
    for shift in (0, 2):
        layer = LaMambaBlock(8, 8, heads=2, window=4, shift=shift).attn.double()
        torch.nn.init.normal_(layer.rel_bias)
        x = torch.randn(1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x)[0, 0, 0].sum(), x)
        seen = grad[0].abs().sum(-1) > 1e-30
        # The corner's shifted window is the corner of 2 x 2 positions.
        side = 4 - shift
        assert seen[:side, :side].all() and seen.sum() == side * side


def flops(model, side, **more):
    with torch.device("meta"):
        x, t = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, t, **more)
    return counter.get_total_flops()


def test_cost_is_linear(monkeypatch):
    """Item 6, counted; the scan's own work (9 L E n a direction) is linear too."""
    monkeypatch.setattr("hf_attn.models.lamamba_diff.modeling_lamamba_diff._check_labels", lambda x, *_: x)
    with torch.device("meta"):
        ours = LaMambaDiffTransformer2DModel(**{**VARIANTS["S"], "sample_size": 64, "depths": [1, 1, 1, 1]}).eval()
        dit = [
            DiTTransformer2DModel(
                num_attention_heads=4, attention_head_dim=18, num_layers=1, sample_size=side, patch_size=1
            ).eval()
            for side in (32, 64)
        ]
    assert flops(ours, 64) / flops(ours, 32) <= 4.6
    assert flops(dit[1], 64) / flops(dit[0], 32) > 6


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("length", [16, 64, 256])
def test_scan_backends_agree(size, length):
    """Item 2: every backend that runs here, with gradients, against the float64 loop."""
    from hf_attn.ops.hfattn_sparse.selective_scan import reference
    from tests.ops.test_selective_scan import inputs

    tensors = inputs(2, 4, length, 6, size)[:5]

    def both(scan, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        y = scan(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    want = both(lambda *t: reference.forward(*t, None)[0], torch.float64)
    for backend in ("auto", "torch"):
        for got, exact in zip(both(scan_of(backend), torch.float32), want, strict=True):
            assert (got - exact).detach().abs().max() <= 1e-4 * max(1, float(exact.detach().abs().max()))


def test_foreign_scans_say_what_they_need():
    operands = [torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 3), torch.zeros(4, 3, 1), *[torch.zeros(1, 4, 2, 1)] * 2]
    for backend in ("mamba_ssm", "hub"):
        with pytest.raises(ValueError, match=f"scan_backend='{backend}' needs CUDA tensors, got cpu"):
            scan_of(backend)(*operands)


def test_checkpointing_and_label_dropout():
    model = tiny(class_dropout_prob=0.0).train()
    out = run(model)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    model.enable_gradient_checkpointing()
    again = torch.autograd.grad(run(model).square().sum(), list(model.parameters()))
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b)
    dropped = tiny(class_dropout_prob=1.0)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5])
    null = dropped(x, t, torch.tensor([5, 5])).sample
    assert not torch.equal(dropped(x, t, torch.tensor([1, 2])).sample, null)
    assert torch.equal(dropped.train()(x, t, torch.tensor([1, 2])).sample, null)


def test_low_precision_and_saving(tmp_path):
    model = tiny()
    with torch.no_grad():
        want = run(model)
    model.save_pretrained(tmp_path)
    again = LaMambaDiffTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.depths == [2, 1, 1, 1]
    with torch.no_grad():
        assert torch.equal(run(again), want)
        half = LaMambaDiffTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert half.encoder[0][0].ssm.A_log.dtype == torch.float32
        assert half.encoder[0][0].ssm.in_proj.weight.dtype == torch.bfloat16
        assert (run(half) - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("mixers", ["scan", "attention"])
def test_ablations_have_no_other_layer(mixers):
    model = tiny(mixers=mixers)
    names = {name.split(".")[3] for name, _ in model.encoder.named_parameters(prefix="e") if name.count(".") > 3}
    assert ("ssm" in names, "attn" in names) == (mixers == "scan", mixers == "attention")
    with torch.no_grad():
        assert run(model).isfinite().all()


@pytest.mark.slow
def test_a_block_compiles_without_breaks():
    block = LaMambaBlock(8, 8, heads=2, window=4, shift=2, state_size=2)
    x, cond = torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(2, 8)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for run_block in (compiled, block):
        out = run_block(x, cond)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        if run_block is compiled:
            want = out, grad
    torch.testing.assert_close((out, grad), want)


@pytest.mark.slow
def test_compiles_as_a_whole():
    model = tiny(depths=[1, 0, 0, 0], bottleneck_depth=0)
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 4.0]), torch.tensor([0, 1]))
    with torch.no_grad():
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(*arguments).sample
        torch.testing.assert_close(got, model(*arguments).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 12}, "sample_size must be a multiple of 8"),
        ({"sample_size": 24, "window_size": 8}, "window_size=8 does not tile stage 1, whose side is 12"),
        ({"base_channels": 10}, "base_channels must be a multiple of 4"),
        ({"base_channels": 12, "num_heads": 5}, "base_channels=12 must be a multiple of num_heads=5"),
        ({"out_channels": 6}, "out_channels must be in_channels=4"),
        ({"depths": [1, 1, 1]}, "depths must be four integers"),
        ({"ssm_conv": 2}, "ssm_conv must be odd"),
        ({"class_dropout_prob": 2.0}, "class_dropout_prob must be from 0 to 1"),
        ({"scan_backend": "cuda"}, "scan_backend must be one of"),
        ({"mixers": "none"}, "mixers must be one of"),
        ({"ssm_state_size": 0}, "ssm_state_size must be an integer >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LaMambaDiffTransformer2DModel(**{**SMALL, **options})


def test_bad_inputs():
    model, x, t, y = tiny(), torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.tensor([0])
    for latents, message in (
        (torch.zeros(1, 4, 8, 16), "square"),
        (torch.zeros(1, 4, 9, 9), "multiple of 8"),
        (torch.zeros(1, 3, 8, 8), "in_channels=4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(latents, t, y)
    with pytest.raises(ValueError, match="cannot be cut into windows of 8"):
        tiny(sample_size=16, window_size=8)(torch.zeros(1, 4, 24, 24), t, y)
    for labels, message in (
        (torch.tensor([6]), "from 0 to 5"),
        (torch.tensor([-1]), "from 0 to 5"),
        (torch.tensor([1.0]), "must be int"),
        (torch.tensor([1, 2]), "must be int"),
        (None, "class_labels must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, t, labels)
    with pytest.raises(ValueError, match="timestep must be given"):
        model(x, None, y)
    with pytest.raises(ValueError, match="cross_attention_kwargs must be empty"):
        model(x, t, y, {"scale": 1})


# Ours -> the official names of the specification, written down independently of the converter.
OFFICIAL = {
    "patch_proj": "patch_embed.proj", "patch_norm": "patch_embed.norm", "time_fc1": "t_embedder.mlp.0",
    "time_fc2": "t_embedder.mlp.2", "label_embed": "y_embedder.embedding_table", "down": "layers.{}.downsample",
    "head.cond_proj": "final_condition_projection", "head.expand": "final_up.expand", "head.norm": "final_up.norm",
    "head.modulation": "final_adaLN_modulation.1", "head.proj": "final_linear", "cond_proj": "condition_projection",
    "modulation": "adaLN_modulation.1", "norm_ssm": "norm", "norm_attn": "norm_swin", "norm_mlp": "norm2",
    "ssm.conv": "op.conv2d", "ssm.x_proj": "op.x_proj_weight", "ssm.dt_proj": "op.dt_projs_weight",
    "ssm.dt_bias": "op.dt_projs_bias", "ssm.A_log": "op.A_logs", "ssm.D": "op.Ds", "ssm.norm": "op.out_norm",
    "attn.rel_bias": "attn.relative_position_bias_table",
}  # fmt: skip


def official_name(name):
    parts = name.split(".")
    if parts[0] in ("encoder", "decoder", "mid"):
        stage = {"encoder": "layers", "decoder": "layers_up", "mid": "mid_layer"}[parts[0]]
        rest = parts[1:] if parts[0] == "mid" else parts[2:]
        number = "" if parts[0] == "mid" else f".{parts[1]}"
        inner = ".".join(rest[1:])
        for ours in sorted(OFFICIAL, key=len, reverse=True):
            if inner == ours or inner.startswith(ours + "."):
                inner = OFFICIAL[ours] + inner[len(ours) :]
                break
        else:
            inner = inner.replace("ssm.", "op.")
        return f"{stage}{number}.blocks.{rest[0]}.{inner}"
    if parts[0] in ("down", "up"):
        stage = f"layers.{parts[1]}.downsample" if parts[0] == "down" else f"layers_up.{int(parts[1]) + 2}.upsample"
        return ".".join([stage, *parts[2:]])
    for ours in sorted(OFFICIAL, key=len, reverse=True):
        if name.startswith(ours + "."):
            return OFFICIAL[ours] + name[len(ours) :]
    return name


@pytest.mark.parametrize("depths", [[2, 1, 1, 1], [1, 1, 1, 0]])
def test_official_weights(depths):
    model = tiny(depths=depths, sample_size=16)
    weights = {"module." + official_name(name): tensor for name, tensor in model.state_dict().items()}
    for name in list(weights):
        if name.endswith((".A_logs", ".Ds")):
            weights[name] = weights[name].flatten(0, 1)
        if name.endswith("relative_position_bias_table"):
            weights[name.replace("bias_table", "index")] = torch.zeros(1)
    assert "module.layers_up.3.blocks.0.op.out_norm.weight" in weights
    again = load_official(weights)
    assert again.config.depths == depths and again.config.window_size == 4
    with torch.no_grad():
        assert torch.equal(run(again), run(model))
    with pytest.raises(ValueError, match="no LaMamba-Diff weights"):
        load_official({"a": torch.zeros(1)})
    del weights["module.final_linear.bias"]
    with pytest.raises(ValueError, match="missing .'head.proj.bias'"):
        load_official(weights)
