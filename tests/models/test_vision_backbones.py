"""What every vision backbone of ours can do: heads, stages, sizes, weights, pipelines, segmentation models, export."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_attn.bench import backbone_speed
from hf_attn.models.vision.layers import DropPath, drop_path_rates
from hf_attn.models.vision.official import OfficialNames, load_official
from tests.models.vision_families import ATTENTION, FAMILIES, classifier, config_of, images, stir

# Where it does, transformers has a dummy class of this name.
AUTO_PROCESSOR_NEEDS_TORCHVISION = "torchvision" in getattr(AutoImageProcessor, "_backends", ())
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SEGMENTATION = {
    "num_labels": 5, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5,
}  # fmt: skip

families = pytest.mark.parametrize("family", FAMILIES)


def backbone(family: str, **changes):
    torch.manual_seed(0)
    model = AutoBackbone.from_config(config_of(family, **changes))
    stir(model)
    return model.eval()


@families
def test_classifier(family):
    model, pixels = classifier(family), images()
    outputs = model(pixels, labels=torch.tensor([1, 3]), output_hidden_states=True)
    assert outputs.logits.shape == (2, 5)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([1, 3]))
    assert outputs.loss.item() == pytest.approx(expected.item())
    assert len(outputs.hidden_states) == len(model.config.stage_names) == 5
    # Each row by itself gives the same: nothing mixes images in evaluation.
    torch.testing.assert_close(model(pixels[1:]).logits, outputs.logits[1:], rtol=1e-4, atol=1e-4)
    assert isinstance(model(pixels, return_dict=False), tuple)
    assert model(pixels).hidden_states is None


@families
def test_every_parameter_learns(family):
    model = classifier(family).train()
    model(images(rows=4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle


@families
def test_gradient_checkpointing_changes_nothing(family):
    grads = []
    for checkpointing in (False, True):
        model = classifier(family, drop_path_rate=0.0).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images(rows=4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@families
def test_out_features_and_sizes(family):
    model = backbone(family, out_features=["stem", "stage2", "stage4"])
    assert model.out_indices == [0, 2, 4] and len(model.channels) == 3
    widths = model.config.stage_channels
    for height, width in ((64, 64), (96, 64), (65, 83), (32, 47)):
        maps = model(images(height, width, rows=1)).feature_maps
        assert [found.shape[1] for found in maps] == [widths[0], widths[2], widths[4]] == model.channels
        assert all(found.isfinite().all() for found in maps)
        assert maps[1].shape[2] in (height // 8, -(-height // 8)) and maps[2].shape[3] in (width // 32, -(-width // 32))
    same = backbone(family, out_indices=[0, 2, 4])
    assert same.out_features == model.out_features


@pytest.mark.parametrize("family", ATTENTION)
def test_eager_equals_sdpa(family):
    pixels, found = images(65, 83), {}
    for implementation in ("eager", "sdpa"):
        model = classifier(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        found[implementation] = model(pixels).logits
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(family, dtype):
    model = classifier(family).to(dtype)
    assert model(images().to(dtype)).logits.isfinite().all()


@families
def test_stochastic_depth_only_in_training(family):
    model = classifier(family, drop_path_rate=0.5)
    pixels = images()
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    assert any(isinstance(module, DropPath) and module.rate > 0 for module in model.modules())
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_drop_path():
    assert drop_path_rates(0.3, [1, 2, 1]) == [[0.0], pytest.approx([0.1, 0.2]), [pytest.approx(0.3)]]
    assert drop_path_rates(0.3, [1]) == [[0.0]]
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert sorted(set(dropped[:, 0, 0].tolist())) == [0.0, pytest.approx(1 / 0.75)]
    assert dropped[:, 0, 0].mean().item() == pytest.approx(1, abs=0.04)


@families
def test_save_load_and_auto_classes(family, tmp_path):
    model, pixels = classifier(family), images()
    model.save_pretrained(tmp_path)
    model.config.image_processor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    expected = model(pixels)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    fields = [config.to_dict() for config in (AutoConfig.from_pretrained(tmp_path), model.config)]
    assert fields[0] == {**fields[1], "_name_or_path": fields[0]["_name_or_path"]}
    assert torch.equal(loaded(pixels).logits, expected.logits)
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        base(pixels).last_hidden_state, model(pixels, output_hidden_states=True).hidden_states[-1], rtol=0, atol=0
    )
    dense = type(backbone(family)).from_pretrained(tmp_path, out_features=["stage3"])
    assert dense.channels == [model.config.stage_channels[3]]
    if not AUTO_PROCESSOR_NEEDS_TORCHVISION:
        assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__ == "ConvNextImageProcessorPil"
    text = (tmp_path / "modeling_hf_attn.py").read_text()
    assert f"import hf_attn.models.{family} as" in text and "Backbone" in text


@families
def test_the_image_processor_is_that_of_imagenet(family):
    from PIL import Image

    processor = config_of(family).image_processor()
    side = int(224 / processor.crop_pct)
    image = Image.effect_noise((side, side + 60), 80).convert("RGB")
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    # A side that needs no resizing: the crop is exact.
    left, top = (side - 224) // 2, (side + 60 - 224) // 2
    box = (
        torch.tensor(list(image.crop((left, top, left + 224, top + 224)).tobytes())).view(224, 224, 3).permute(2, 0, 1)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(found, (box / 255 - mean) / std, rtol=1e-4, atol=1e-4)


@families
def test_official_weights(family):
    """The names of the authors' code, as the benchmark's reference has them; a checkpoint with its wrappers."""
    module = importlib.import_module(f"hf_attn.bench.backbones.{family}")
    config = type(config_of(family)).preset(module.PRESETS[0], num_labels=7)
    with torch.device("meta"):
        state = module.Reference(config).state_dict()
    state = {name: torch.randn(t.shape) if t.is_floating_point() else torch.tensor(3) for name, t in state.items()}
    model = AutoModelForImageClassification.from_config(config)
    model.load_official_weights({"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3})
    own = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(own[model.official_names.rename(name)], tensor), name
    # The backbone has no head: it takes the rest.
    dense = AutoBackbone.from_config(config)
    dense.load_official_weights(state)
    assert torch.equal(dense.base_model.state_dict()[(name := next(iter(dense.base_model.state_dict())))], state[name])

    first = next(iter(state))
    before = {name: tensor.clone() for name, tensor in own.items()}
    lacking = {name: tensor for name, tensor in state.items() if name != first}
    for broken, message in (
        (lacking, "missing"),
        ({**state, "blocks.9.strange": torch.zeros(1)}, r"no place for \(1\): blocks.9.strange"),
        ({**state, first: torch.zeros(3)}, r"other shape \(1\)"),
        ({"weights": {"a": 1}}, "no state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_official_weights(broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_longest_prefix_counts():
    names = OfficialNames({"": "net.", "head.": "classifier."}, unused=("aux.",))
    assert names.rename("head.weight") == "classifier.weight" and names.rename("header") == "net.header"
    assert OfficialNames({"a.": "b."}).rename("c.a.") is None
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2, bias=False)})
    load_official(model, {"weight": torch.ones(2, 2), "aux.weight": torch.ones(1)}, names)
    assert torch.equal(model["net"].weight, torch.ones(2, 2))


@families
def test_fields_left_out_are_filled(family):
    """A type checker is told that they are never None: after construction that is so, left out or given as None."""
    cls = type(config_of(family))
    names = [f.name for f in dataclasses.fields(cls) if str(f.type).startswith("Filled[")]
    assert names and all(getattr(cls(), name) is not None for name in names)
    assert cls(**dict.fromkeys(names)).to_dict() == cls().to_dict()


@families
def test_bad_input(family):
    model = classifier(family)
    with pytest.raises(ValueError, match="at least 32"):
        model(images(31, 64))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(images()[:, :1])
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model()
    with pytest.raises(StrictDataclassClassValidationError, match="drop_path_rate=1.0"):
        classifier(family, drop_path_rate=1.0)
    with pytest.raises(ValueError, match="unknown preset"):
        type(model.config).preset("huge")
    with pytest.raises(RuntimeError, match="eval"):
        model.train().reparameterize()


@families
def test_reparameterised_models_give_the_same(family, tmp_path):
    model, pixels = classifier(family), images(65, 83)
    expected, size = model(pixels).logits, model.num_parameters()
    assert model.reparameterize() is model and model.config.deploy
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert model.num_parameters() <= size
    folded = model(pixels).logits
    assert torch.equal(model.reparameterize()(pixels).logits, folded)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(pixels).logits, folded)


@families
def test_export(family):
    model = classifier(family)
    size = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (images(),), dynamic_shapes=None if size is None else ({0: size},))
    pixels = images(rows=3)
    torch.testing.assert_close(program.module()(pixels).logits, model(pixels).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", [f if f == "biformer" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_compiles_as_one_graph(family):
    model, pixels = classifier(family), images(rows=2)
    torch.compiler.reset()
    with torch.inference_mode():
        found = torch.compile(model, backend="eager", fullgraph=True)(pixels).logits
        torch.testing.assert_close(found, model(pixels).logits, rtol=1e-5, atol=1e-5)


@families
def test_upernet(family):
    config = config_of(family, out_features=STAGES)
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config,
            hidden_size=16,
            auxiliary_channels=8,
            auxiliary_in_channels=config.stage_channels[3],
            num_labels=5,
        )
    )
    labels = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(0))
    outputs = model(images(64, 96), labels=labels)
    assert outputs.logits.shape == (2, 5, 64, 96)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.backbone.hidden_states_norms.parameters())


@families
def test_mask2former_and_oneformer(family):
    config, pixels = config_of(family, out_features=STAGES), images(64, 96)
    mask2former = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=config, feature_size=32, mask_feature_size=32, **SEGMENTATION)
    ).eval()
    assert mask2former(pixel_values=pixels).masks_queries_logits.shape[:2] == (2, 5)
    oneformer = OneFormerForUniversalSegmentation(
        OneFormerConfig(
            backbone_config=config,
            conv_dim=32,
            mask_dim=32,
            task_seq_len=7,
            max_seq_len=7,
            query_dec_layers=1,
            is_training=False,
            **SEGMENTATION,
        )  # fmt: skip
    ).eval()
    outputs = oneformer(pixel_values=pixels, task_inputs=torch.ones(2, 7))
    assert outputs.masks_queries_logits.shape[:2] == (2, 5)


PIPELINES = """
import importlib.machinery, sys, tempfile
class Lacking(importlib.machinery.PathFinder):
    "Finds everything but what inference has to do without (scikit-learn would bring scipy in)."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        lacking = name.partition(".")[0] in ("torchvision", "natten", "scipy", "sklearn")
        return None if lacking else super().find_spec(name, path, target)
sys.meta_path = [Lacking if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {root!r})
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from tests.models.vision_families import ATTENTION, FAMILIES, classifier, config_of
image = Image.effect_noise((90, 70), 60).convert("RGB")
for family in FAMILIES:
    with tempfile.TemporaryDirectory() as folder:
        model = classifier(family)
        model.save_pretrained(folder)
        model.config.image_processor().save_pretrained(folder)
        found = pipeline("image-classification", folder, top_k=5)(image)
        assert len(found) == 5 and abs(sum(row["score"] for row in found) - 1) < 1e-4, found
        config = config_of(family, out_features=["stage1", "stage2", "stage3", "stage4"])
        head = dict(hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=config.stage_channels[3], num_labels=5)
        UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **head)).save_pretrained(folder)
        SegformerImageProcessorPil(size=dict(height=64, width=64)).save_pretrained(folder)
        found = pipeline("image-segmentation", folder)(image)
        assert found and all(part["mask"].size == (90, 70) for part in found), found
print("all found")
"""


@pytest.mark.skipif(AUTO_PROCESSOR_NEEDS_TORCHVISION, reason="AutoImageProcessor itself asks for torchvision in 5.17")
def test_pipelines_need_pil_only():
    """Classification and segmentation end to end where torchvision, natten and scipy are not installed."""
    root = str(importlib.import_module("tests").__path__[0] + "/..")
    done = subprocess.run([sys.executable, "-c", PIPELINES.format(root=root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "all found"


def test_every_family_has_a_reference_of_the_same_function():
    """The benchmark's references at 224 pixels: the same logits (its own check, here for the smallest variants)."""
    assert set(backbone_speed.families()) <= set(FAMILIES)
    for family in backbone_speed.families():
        module = importlib.import_module(f"hf_attn.bench.backbones.{family}")
        reference, model = backbone_speed.pair(family, module.PRESETS[0])
        pixels = images(224, 224, rows=1)
        with torch.inference_mode():
            assert backbone_speed.error(model(pixels).logits, reference(pixels)) <= backbone_speed.TOLERANCE
