"""DiNAT without natten: numbers of the golden file, the published variants, and the host's classes patched."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, DinatConfig
from transformers.models.dinat import modeling_dinat as host
from transformers.utils import OptionalDependencyNotAvailable

import hf_attn
from hf_attn.models.dinat import (
    VARIANTS,
    DinatAttnBackbone,
    DinatAttnForImageClassification,
    DinatAttnModel,
    NatAttnForImageClassification,
    NatConfig,
    convert_state_dict,
    patch_dinat,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "neighborhood_attention.safetensors"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
PARAMETERS = {"mini": 19_984_174, "tiny": 27_901_582, "small": 50_719_681, "base": 89_769_652, "large": 200_943_514}


def tiny_config(kind=DinatConfig, **options):
    sizes = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "kernel_size": 3, "mlp_ratio": 2.0}
    dilations = {} if kind is NatConfig else {"dilations": [[1, 5], [3], [1], [1]]}
    return kind(**(sizes | dilations | {"num_labels": 5, "out_features": STAGES} | options))


def shake(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def pixels(*size):
    return torch.randn(*(size or (2, 3, 50, 66)), generator=torch.Generator().manual_seed(1))


def golden():
    """Weights and results of the `dinat` case: model, norms of the feature maps, and the rest."""
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        names = [name for name in file.keys() if name.startswith("dinat.")]
        tensors = {name.removeprefix("dinat."): file.get_tensor(name) for name in names}
    cases = config.get("cases", config)
    options = cases["dinat"] if "embed_dim" in cases["dinat"] else cases["dinat"].get("config", cases["dinat"])
    return tensors, DinatConfig(**{k: v for k, v in options.items() if k in vars(DinatConfig()) or k == "out_features"})


@torch.no_grad()
@pytest.mark.parametrize("attentions", [False, True])
def test_golden(attentions):
    tensors, config = golden()
    weights = {name[2:]: t for name, t in tensors.items() if name.startswith("w.")}
    config.num_labels = len(weights["classifier.bias"])
    model = DinatAttnForImageClassification(config).eval()
    model.load_state_dict(weights)
    out = model(tensors["pixel_values"], output_attentions=attentions)
    assert (out.logits - tensors["logits"]).abs().max() <= 1e-4
    config.set_output_features_output_indices(out_features=STAGES, out_indices=None)
    backbone = DinatAttnBackbone(config).eval()
    norms = {f"hidden_states_norms.{k.removeprefix('backbone_norms.')}": t for k, t in tensors.items() if "_norms" in k}
    names = {name.removeprefix("dinat."): t for name, t in weights.items() if "layernorm." not in name[:16]}
    backbone.load_state_dict({k: t for k, t in names.items() if not k.startswith("classifier")} | norms)
    maps = backbone(tensors["pixel_values"]).feature_maps
    for i, found in enumerate(maps):
        assert (found - tensors[f"feature_maps.{i}"]).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", PARAMETERS)
def test_published_parameter_counts(variant):
    with torch.device("meta"):
        model = DinatAttnForImageClassification(DinatConfig(num_labels=1000, **VARIANTS[variant]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]


def test_dilations_of_the_variants():
    for name, options in VARIANTS.items():
        assert [len(stage) for stage in options["dilations"]] == options["depths"], name
    assert VARIANTS["mini"]["dilations"] == DinatConfig().dilations
    assert VARIANTS["oneformer_large"]["dilations"][2] == [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]


def test_patched_host_runs_forward_and_backward(tmp_path):
    with pytest.raises(ImportError, match="natten"):
        host.DinatForImageClassification(tiny_config())
    undo = patch_dinat()
    try:
        model = shake(host.DinatForImageClassification(tiny_config()))
        out = model(pixels(), labels=torch.tensor([1, 3]))
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.save_pretrained(tmp_path)
        again = host.DinatForImageClassification.from_pretrained(tmp_path).eval()
        ours = DinatAttnForImageClassification.from_pretrained(tmp_path).eval()
        for other in (again, ours):
            assert torch.equal(other(pixels()).logits, out.logits)
        assert isinstance(AutoModelForImageClassification.from_config(tiny_config()), host.DinatForImageClassification)
        assert len(AutoBackbone.from_config(tiny_config())(pixels()).feature_maps) == 4
    finally:
        undo()
    with pytest.raises(ImportError, match="natten"):
        host.DinatModel(tiny_config())


@torch.no_grad()
def test_attentions_sum_to_one_and_give_the_same_output():
    """One tensor a stage, of its last block; the grid is the padded one where a window does not fit."""
    model = shake(DinatAttnModel(tiny_config()))
    plain, out = model(pixels()), model(pixels(), output_attentions=True)
    assert (plain.last_hidden_state - out.last_hidden_state).abs().max() <= 1e-5
    assert [a.shape for a in out.attentions] == [
        (2, 1, 15, 17, 9), (2, 2, 9, 9, 9), (2, 2, 4, 5, 9), (2, 4, 3, 3, 9),
    ]  # fmt: skip
    for weights in out.attentions:
        assert (weights.sum(-1) - 1).abs().max() <= 1e-5
    assert plain.attentions is None


def test_dropout_of_weights_in_training_only():
    model = shake(DinatAttnModel(tiny_config(attention_probs_dropout_prob=0.5, drop_path_rate=0.0)))
    assert torch.equal(*(model(pixels()).last_hidden_state for _ in range(2)))
    layer = model.train().encoder.levels[0].layers[0].attention.self
    x = torch.randn(1, 5, 6, 8)
    assert not torch.equal(*(layer(x)[0] for _ in range(2)))


def test_gradient_checkpointing_changes_nothing():
    found = []
    for enabled in (False, True):
        model = DinatAttnForImageClassification(tiny_config(drop_path_rate=0.0)).train()
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(pixels(), labels=torch.tensor([1, 3])).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_nat_configs_and_checkpoints(tmp_path):
    """model_type "nat", which transformers dropped: found by the Auto classes, names of the old checkpoints."""
    options = {name: value for name, value in vars(tiny_config(NatConfig)).items() if name in ("embed_dim", "depths")}
    heads = {"num_heads": [1, 2, 2, 4], "kernel_size": 3, "out_features": STAGES}
    config = AutoConfig.for_model("nat", **options, **heads)
    assert type(config) is NatConfig and config.dilations == [[1, 1], [1], [1], [1]]
    model = shake(AutoModelForImageClassification.from_config(config))
    assert type(model) is NatAttnForImageClassification
    assert "nat.encoder.levels.0.layers.0.attention.self.rpb" in model.state_dict()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels()).logits, model(pixels()).logits)
    dinat = tiny_config(dilations=[[1, 1], [1], [1], [1]], mlp_ratio=config.mlp_ratio, num_labels=config.num_labels)
    same = DinatAttnForImageClassification(dinat).eval()
    same.load_state_dict({name.replace("nat.", "dinat.", 1): t for name, t in model.state_dict().items()})
    assert torch.equal(same(pixels()).logits, model(pixels()).logits)
    assert len(AutoBackbone.from_config(config)(pixels()).feature_maps) == 4
    with pytest.raises(ValueError, match="has no dilation"):
        NatConfig(depths=[1], num_heads=[1], dilations=[[2]])


def official(config, gamma=False, norms=False):
    """A state dict with the official names, filled with numbers of its own."""
    torch.manual_seed(0)
    width, state = config.embed_dim, {}

    def add(name, *shape):
        state[name] = torch.randn(*shape)

    for i, (a, b) in enumerate(((3, width // 2), (width // 2, width))):
        add(f"patch_embed.proj.{i}.weight", b, a, 3, 3)
        add(f"patch_embed.proj.{i}.bias", b)
    for part in ("weight", "bias"):
        add(f"patch_embed.norm.{part}", width)
    for stage, depth in enumerate(config.depths):
        c, hidden = width * 2**stage, int(width * 2**stage * config.mlp_ratio)
        for block in range(depth):
            at = f"levels.{stage}.blocks.{block}"
            add(f"{at}.attn.rpb", config.num_heads[stage], *[2 * config.kernel_size - 1] * 2)
            for name, n, m in (("attn.qkv", 3 * c, c), ("attn.proj", c, c), ("mlp.fc1", hidden, c),
                               ("mlp.fc2", c, hidden)):  # fmt: skip
                add(f"{at}.{name}.weight", n, m)
                add(f"{at}.{name}.bias", n)
            for name in ("norm1", "norm2"):
                add(f"{at}.{name}.weight", c)
                add(f"{at}.{name}.bias", c)
            for name in ("gamma1", "gamma2") if gamma else ():
                add(f"{at}.{name}", c)
        if norms:
            add(f"norm{stage}.weight", c)
            add(f"norm{stage}.bias", c)
        if stage < 3:
            add(f"levels.{stage}.downsample.reduction.weight", 2 * c, c, 3, 3)
            add(f"levels.{stage}.downsample.norm.weight", 2 * c)
            add(f"levels.{stage}.downsample.norm.bias", 2 * c)
    for name, shape in (("norm.weight", (c,)), ("norm.bias", (c,)), ("head.weight", (5, c)), ("head.bias", (5,))):
        add(name, *shape)
    return state


@pytest.mark.parametrize("gamma", [False, True])
def test_official_checkpoints(gamma):
    config = tiny_config(layer_scale_init_value=0.1 if gamma else 0.0)
    state = official(config, gamma, norms=True)
    model = DinatAttnForImageClassification(config)
    model.load_state_dict(convert_state_dict(state, config))
    layer = model.dinat.encoder.levels[0].layers[1]
    qkv = state["levels.0.blocks.1.attn.qkv.weight"]
    assert torch.equal(layer.attention.self.value.weight, qkv[16:])
    assert torch.equal(layer.output.dense.bias, state["levels.0.blocks.1.mlp.fc2.bias"])
    if gamma:
        assert torch.equal(layer.layer_scale_parameters[1], state["levels.0.blocks.1.gamma2"])
    DinatAttnModel(config).load_state_dict(convert_state_dict(state, config, target="model"))
    backbone = DinatAttnBackbone(config)
    named = {f"backbone.{name}": tensor for name, tensor in state.items()}
    backbone.load_state_dict(convert_state_dict(named, config, target="backbone"))
    assert torch.equal(backbone.hidden_states_norms["stage4"].bias, state["norm3.bias"])


def test_other_checkpoints_are_named():
    config = tiny_config()
    state = official(config)
    with pytest.raises(ValueError, match="is no parameter of the official"):
        convert_state_dict(state | {"levels.0.blocks.0.attn.qk.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="is no state dict of the official"):
        convert_state_dict({"conv1.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"'kernel_size': 3.*'kernel_size': 7.*no variant fits"):
        convert_state_dict(state, tiny_config(kernel_size=7))
    published = official(DinatConfig(**(VARIANTS["mini"] | {"num_labels": 5})))
    with pytest.raises(ValueError, match="it is variant mini"):
        convert_state_dict(published, DinatConfig(**VARIANTS["tiny"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"kernel_size": 1}, "kernel_size must be odd"),
        ({"dilations": [[1], [1], [1], [1]]}, "must describe the same stages"),
        ({"dilations": [[1, 0], [1], [1], [1]]}, "dilations must be integers >= 1"),
        ({"num_heads": [1, 3, 2, 4]}, "stage 2 has 16 channels, which num_heads=3 does not divide"),
    ],
)
def test_wrong_configs_are_named(options, message):
    for kind in (DinatAttnModel, DinatAttnBackbone):
        with pytest.raises(ValueError, match=message):
            kind(tiny_config(**options))


def test_apply_on_a_model_that_was_built_by_the_host():
    undo = patch_dinat()
    model = shake(host.DinatForImageClassification(tiny_config()))
    undo()
    wanted = model(pixels()).logits
    for module in model.modules():  # as the host builds it where natten is installed
        if type(module).__name__ == "MendedNeighborhoodAttention":
            module.__class__ = host.NeighborhoodAttention
    with pytest.raises(OptionalDependencyNotAvailable):
        model(pixels())
    hf_attn.apply(model, "neighborhood")
    assert torch.equal(model(pixels()).logits, wanted)
    hf_attn.remove(model)
    assert any(type(m) is host.NeighborhoodAttention for m in model.modules())
    with pytest.raises(ValueError, match="takes none"):
        hf_attn.apply(model, "neighborhood", kernel=3)


@pytest.mark.slow
def test_a_newer_natten_does_not_break_the_import(tmp_path):
    """natten >= 0.17.5 has no natten2dqkrpb: the host's module cannot be imported, ours can."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '0.21.0'\n")
    (tmp_path / "natten" / "functional.py").write_text("def na2d(*args, **kwargs):\n    raise NotImplementedError\n")
    info = tmp_path / "natten-0.21.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: natten\nVersion: 0.21.0\n")
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import transformers.models.dinat.modeling_dinat
        except ImportError:
            print("host fails")
        import torch
        from transformers import DinatConfig
        from hf_attn.models.dinat import DinatAttnModel
        sizes = dict(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, kernel_size=3, dilations=[[1]] * 4)
        print(tuple(DinatAttnModel(DinatConfig(**sizes))(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "host fails" in run.stdout and "(1, 1, 1, 64)" in run.stdout
