"""OneFormer repaired: the host's numbers where the host is right, the official ones where it is not."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch
from transformers import DinatConfig, OneFormerConfig, OneFormerForUniversalSegmentation, OneFormerModel, SwinConfig
from transformers.models.dinat import modeling_dinat as dinat_host
from transformers.models.oneformer import modeling_oneformer as host
from transformers.utils import OptionalDependencyNotAvailable

import hf_attn
from hf_attn.models import FAMILIES
from hf_attn.models.dinat import patch_dinat
from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation, OneFormerAttnModel, patch_oneformer
from tests.models.oneformer_models import STAGES, inputs, labels, ours, stock, texts, tiny_config

RESULTS = ("class_queries_logits", "masks_queries_logits", "task_token", "transformer_decoder_object_queries")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"use_task_norm": False}], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (50, 39)], ids=str)
def test_eager_repeats_the_host_bit_for_bit(options, size):
    theirs, model = stock(**options), ours(**options)
    model.load_state_dict(theirs.state_dict())
    given = inputs(size=size)
    wanted, got = (m(**given, output_attentions=True, output_hidden_states=True) for m in (theirs, model))
    for name in RESULTS:
        assert torch.equal(got[name], wanted[name]), name
    for a, b in zip(got.attentions, wanted.attentions, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for a, b in zip(got.auxiliary_predictions, wanted.auxiliary_predictions, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert model(**given).attentions is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("implementation", "stance"),
    [
        ("sdpa", "default"),
        ("flex_attention", "force_eager"),
        pytest.param("flex_attention", "default", marks=pytest.mark.slow),  # compiles C++
    ],
)
def test_other_implementations(implementation, stance):
    with torch.compiler.set_stance(stance):
        check_implementation(implementation)


def check_implementation(implementation):
    model = ours()
    given = inputs()
    wanted = model(**given)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    assert model.config.backbone_config._attn_implementation == "sdpa"
    for found in (model, ours(implementation)):
        got = found(**given)
        for name in RESULTS:
            assert (got[name] - wanted[name]).abs().max() <= 2e-4, (name, (got[name] - wanted[name]).abs().max())


@torch.no_grad()
def test_weights_on_request_are_those_of_eager():
    model, given = ours(), inputs()
    wanted = model(**given, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="runs eager attention"):
        got = model(**given, output_attentions=True)
    own, cross = got.attentions[0]
    assert own.shape == (2, 4, 6, 6) and cross.shape == (2, 6, 6)
    for a, b in zip(got.attentions, wanted.attentions, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= 1e-5


def test_unknown_implementations_are_refused():
    for name in ("fused", "hf_attn_nothing"):
        with pytest.raises(ValueError, match=name):
            ours(name)
    with pytest.raises(ValueError, match="[Ff]lash"):
        OneFormerAttnForUniversalSegmentation(tiny_config()).set_attn_implementation("flash_attention_2")


@torch.no_grad()
def test_the_mask_is_not_repeated_for_the_heads(monkeypatch):
    """The function behind the interface gets `[B, 1, Q, HW]`, True where a query may look, and no empty row."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        return sdpa(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watch)
    ours("sdpa")(**inputs())
    masks = [mask for mask in seen if mask is not None and mask.dim() == 4 and mask.shape[2] == 6]
    assert len(masks) == 3 and all(mask.shape[:2] == (2, 1) and mask.dtype == torch.bool for mask in masks)
    assert all(mask.any(-1).all() for mask in masks)


def test_checkpoints_are_the_hosts(tmp_path):
    """Strict both ways, also from and to disk; only the text tower is more in a model that trains."""
    theirs, model = stock(), ours()
    assert model.load_state_dict(theirs.state_dict()) and theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    again, info = OneFormerAttnForUniversalSegmentation.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "ours")
    back = OneFormerForUniversalSegmentation.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        results = [m(**inputs()).masks_queries_logits for m in (theirs, again.eval(), back.eval())]
    assert all(torch.equal(result, results[0]) for result in results)
    training = ours(is_training=True)
    missing = training.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("text_mapper" in key for key in missing.missing_keys)


def test_apply_mends_a_stock_model_and_remove_gives_it_back(tmp_path):
    theirs = stock(is_training=True)
    given = inputs() | {"text_inputs": texts(theirs.config)}
    model = copy.deepcopy(theirs)
    assert hf_attn.apply(model, "neighborhood", text_attention="bidirectional") is model
    assert hf_attn.stats(model)["repairs"] == ["neighborhood"]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.isfinite(model(**given).masks_queries_logits).all()
    model.save_pretrained(tmp_path)
    assert '"architectures": [\n    "OneFormerForUniversalSegmentation"\n  ]' in (tmp_path / "config.json").read_text()
    hf_attn.remove(model)
    assert type(model) is OneFormerForUniversalSegmentation
    assert {type(m).__module__ for m in model.modules()} & {host.__name__}
    assert not [m for m in model.modules() if "hf_attn" in type(m).__module__]
    assert not hasattr(model.config, "text_attention")
    with pytest.raises(ValueError, match="text_attention must be one of"):
        hf_attn.apply(model, "neighborhood", text_attention="none")
    with pytest.raises(ValueError, match="unknown option 'text_atention'.*did you mean"):
        hf_attn.apply(model, "neighborhood", text_atention="causal")
    assert not hasattr(model.config, "text_attention")


def test_patch_lets_the_hosts_classes_build_mended_models():
    before = dict(vars(OneFormerForUniversalSegmentation)), dict(vars(OneFormerModel))
    undo = patch_oneformer()
    try:
        model = OneFormerForUniversalSegmentation._from_config(tiny_config(), attn_implementation="sdpa")
        assert type(model) is OneFormerForUniversalSegmentation and type(model.model) is OneFormerModel
        wanted = ours()
        wanted.load_state_dict(model.state_dict())
        with torch.no_grad():
            a, b = (m.eval()(**inputs()).masks_queries_logits for m in (model, wanted))
        assert (a - b).abs().max() <= 2e-4
        with pytest.raises(ValueError, match="task_inputs must be"):
            model(inputs()["pixel_values"], torch.zeros(2, 3))
    finally:
        undo()
    assert (dict(vars(OneFormerForUniversalSegmentation)), dict(vars(OneFormerModel))) == before
    with pytest.raises(ValueError, match="sdpa|scaled_dot_product"):
        OneFormerForUniversalSegmentation._from_config(tiny_config(), attn_implementation="sdpa")


def dinat_config(**options):
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 2, 4], "kernel_size": 3, "mlp_ratio": 2.0}
    return DinatConfig(**sizes, dilations=[[5], [3], [1], [1]], out_features=STAGES, **options)


@pytest.mark.skipif(version("transformers").startswith("5.17."), reason="5.17 needs torchvision's spec to be findable")
def test_neither_scipy_nor_natten_nor_torchvision():
    """A DiNAT model predicts, trains, is saved and loaded in a process that cannot import them."""
    script = """
        import sys, tempfile
        for name in ("scipy", "natten", "torchvision"):
            sys.modules[name] = None
        import torch
        from tests.models.oneformer_models import inputs, labels, ours
        from tests.models.test_oneformer import dinat_config
        model = ours("sdpa", backbone_config=dinat_config())
        with torch.no_grad():
            wanted = model(**inputs()).masks_queries_logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs()).masks_queries_logits, wanted) and wanted.isfinite().all()
        model.train()(**inputs(), **labels()).loss.backward()
        assert model.model.pixel_level_module.encoder.encoder.levels[0].layers[0].attention.self.rpb.grad.any()
        assert not [n for n in sys.modules if n.split(".")[0] in ("scipy", "natten", "torchvision") and sys.modules[n]]
        print("done")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0 and "done" in run.stdout, run.stderr[-2000:]


BACKBONES = [f for f in FAMILIES if "AutoBackbone" in dict(f.heads)]


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES, ids=lambda family: family.model_type)
def test_our_backbones(family, tmp_path):
    """Every vision family of this package, as small as its config allows; the config survives JSON."""
    backbone = getattr(__import__(family.module, fromlist=[family.config]), family.config)(
        **SMALL.get(family.model_type, {}), out_features=STAGES
    )
    config = tiny_config(backbone_config=backbone)
    config.save_pretrained(tmp_path)
    again = OneFormerConfig.from_pretrained(tmp_path)
    assert type(again.backbone_config) is type(backbone) and again.to_dict() == config.to_dict()
    model = OneFormerAttnForUniversalSegmentation(again).eval()
    assert model(**inputs()).masks_queries_logits.shape == (2, 6, 16, 24)


# Arguments that make a family small; its defaults otherwise.
SMALL = {"nat": {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 2, 4], "kernel_size": 3}}


def test_causal_mechanisms_are_refused_by_name():
    with pytest.raises(ValueError, match="hf_attn_streaming needs causal attention"):
        ours("hf_attn_streaming")(**inputs())


def test_apply_mends_the_backbone_too():
    """A stock OneFormer with a DiNAT backbone, as the host builds it where natten is installed."""
    undo = patch_dinat()
    theirs = stock(backbone_config=dinat_config())
    undo()
    layers = [m for m in theirs.modules() if isinstance(m, dinat_host.NeighborhoodAttention)]
    for layer in layers:
        layer.__class__ = dinat_host.NeighborhoodAttention
        del layer.config
    with pytest.raises(OptionalDependencyNotAvailable):
        theirs(**inputs())
    wanted = ours(backbone_config=dinat_config())
    wanted.load_state_dict(theirs.state_dict())
    hf_attn.apply(theirs, "neighborhood")
    with torch.no_grad():
        assert torch.equal(theirs(**inputs()).masks_queries_logits, wanted(**inputs()).masks_queries_logits)
    hf_attn.remove(theirs)
    assert all(type(layer) is dinat_host.NeighborhoodAttention for layer in layers)
    # Built mended, a model keeps what it needs.
    hf_attn.remove(hf_attn.apply(wanted, "neighborhood"))
    assert wanted(**inputs()).masks_queries_logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(3, 64, 96)}, "pixel_values must be"),
        ({"task_inputs": torch.zeros(2, 8)}, "task_inputs must be"),
        ({"task_inputs": None}, "task_inputs must be"),
        ({"mask_labels": [torch.zeros(1, 64, 96)] * 2}, "class_labels is missing"),
        (labels() | {"class_labels": [torch.arange(2)] * 2}, "3, 2\\] masks and \\[2, 2\\] classes"),
        (labels() | {"class_labels": [torch.arange(3), torch.tensor([1, 5])]}, "class_labels must be in 0..4"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ours()(**(inputs() | change))


def test_wrong_options_and_backbones_are_named():
    with pytest.raises(ValueError, match="deformable_attn_implementation must be one of"):
        OneFormerAttnModel(tiny_config(deformable_attn_implementation="cuda"))
    short = SwinConfig(embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, out_features=["stage4"])
    with pytest.raises(ValueError, match="gives 1 feature maps"):
        OneFormerAttnModel(tiny_config(backbone_config=short))
    with pytest.raises(ValueError, match="must hold num_queries - text_encoder_n_ctx = 6 texts"):
        model = ours(is_training=True)
        model(**inputs(), text_inputs=torch.ones(2, 5, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="text_inputs must be token ids"):
        model(**inputs(), text_inputs=torch.ones(2, 6, 8, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = ours("sdpa").to(dtype)
    given = inputs()
    out = model(given["pixel_values"].to(dtype), given["task_inputs"])
    assert out.masks_queries_logits.dtype == dtype and out.masks_queries_logits.isfinite().all()
