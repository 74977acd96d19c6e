"""OneFormer repaired: the host's numbers where the host is right, the official ones where it is not."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, OneFormerModel, SwinConfig
from transformers.models.oneformer import modeling_oneformer as host

import hf_attn
from hf_attn.integrations.transformers.repairs.oneformer.assignment import shortest_paths
from hf_attn.models.oneformer import OneFormerAttnForUniversalSegmentation, OneFormerAttnModel, patch_oneformer

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config(**options) -> OneFormerConfig:
    backbone = options.pop("backbone_config", None) or SwinConfig(
        embed_dim=4, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, image_size=64, mlp_ratio=2.0,
        out_features=STAGES,
    )  # fmt: skip
    sizes = dict.fromkeys(("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32)
    layers = {"encoder_layers": 2, "decoder_layers": 4, "query_dec_layers": 1, "num_attention_heads": 4}
    text = {"text_encoder_width": 64, "text_encoder_context_length": 9, "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 23, "text_encoder_n_ctx": 2}  # fmt: skip
    rest = {"num_queries": 6, "num_labels": 5, "task_seq_len": 7, "train_num_points": 64}
    if options.get("is_training") and "hidden_dim" not in options:
        text["text_encoder_width"], text["text_encoder_n_ctx"] = 64, 0
    return OneFormerConfig(backbone_config=backbone, **(sizes | layers | text | rest | options))


def shake(model, seed=0):
    """Random weights everywhere, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        scale, centre = (0.1, 1.0) if "norm" in name and p.dim() == 1 and "weight" in name else (0.2, 0.0)
        p.data = centre + scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def stock(attn_implementation="eager", **options):
    return shake(
        OneFormerForUniversalSegmentation._from_config(tiny_config(**options), attn_implementation=attn_implementation)
    )


def ours(attn_implementation="eager", **options):
    model = OneFormerAttnForUniversalSegmentation._from_config(
        tiny_config(**options), attn_implementation=attn_implementation
    )
    return shake(model)


def inputs(batch=2, size=(64, 96), seed=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, *size, generator=generator)
    return {"pixel_values": pixels, "task_inputs": torch.randint(0, 9, (batch, 7), generator=generator).float()}


def labels(batch=2, size=(64, 96), counts=(3, 2)):
    generator = torch.Generator().manual_seed(5)
    masks = [torch.randint(0, 2, (n, *size), generator=generator).float() for n in counts[:batch]]
    return {"mask_labels": masks, "class_labels": [torch.arange(n) for n in counts[:batch]]}


def texts(config, batch=2):
    count = config.num_queries - config.text_encoder_n_ctx
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, config.text_encoder_vocab_size, (batch, count, config.text_encoder_context_length),
                         generator=generator)  # fmt: skip


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
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_other_implementations(implementation):
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


def test_input_projections_are_parameters():
    """Fault 7 of the host: with hidden_dim != conv_dim they are in a plain list, neither saved nor trained."""
    options = {"hidden_dim": 64, "mask_dim": 32, "dim_feedforward": 32}
    name = "model.transformer_module.input_projections.0.weight"
    assert name not in stock(**options).state_dict()
    model = ours(**options)
    assert name in model.state_dict()
    model.train()(**inputs(), **labels()).loss.backward()
    assert model.get_parameter(name).grad.abs().max() > 0
    again = ours(**options)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        a, b = (m.eval()(**inputs()).masks_queries_logits for m in (model, again))
    assert torch.equal(a, b)


def test_dropout_follows_the_mode_of_the_module():
    """Fault 6: the host's encoder drops in eval() when `is_training`, and never in train() otherwise."""
    given = inputs()
    theirs = stock(is_training=True, dropout=0.5)
    given_text = given | {"text_inputs": texts(theirs.config)}
    with torch.no_grad():
        assert not torch.equal(*(theirs(**given_text).masks_queries_logits for _ in range(2)))
        model = ours(is_training=True, dropout=0.5)
        first, second = (model(**given_text) for _ in range(2))
        assert torch.equal(first.masks_queries_logits, second.masks_queries_logits)
        for flag in (True, False):
            model = ours(is_training=flag, dropout=0.5).train()
            encoder = model.model.pixel_level_module
            assert not torch.equal(*(encoder(given["pixel_values"]).decoder_last_feature for _ in range(2)))


@torch.no_grad()
def test_text_is_causal():
    """A later token (not the argmax one) must not change the text's feature; the host's feature follows it."""
    model = ours(is_training=True)
    encoder = model.model.text_mapper.text_encoder
    ids = torch.tensor([[3, 22, 5, 6, 7, 8, 9, 1, 2]])
    other = ids.clone()
    other[0, 5] = 4
    assert torch.equal(encoder(ids), encoder(other))
    theirs = stock(is_training=True)
    wanted = theirs.model.text_mapper.text_encoder
    assert not torch.equal(wanted(ids), wanted(other))
    model = ours(is_training=True, text_attention="bidirectional")
    model.load_state_dict(theirs.state_dict())
    assert (model.model.text_mapper.text_encoder(ids) - wanted(ids)).abs().max() <= 1e-5


def test_text_is_needed_for_a_loss_only():
    model = ours(is_training=True)
    given = inputs()
    with torch.no_grad():
        assert model(**given).masks_queries_logits.shape == (2, 6, 16, 24)
    with pytest.raises(ValueError, match="pass text_inputs too"):
        model(**given, **labels())


def run_loss(model, seed=11, **options):
    torch.manual_seed(seed)
    return model(**inputs(), **labels(), **options)


def test_loss_equals_the_hosts():
    """Same points (seeded), same assignment, same terms; gradients too."""
    theirs, model = stock(), ours()
    model.load_state_dict(theirs.state_dict())
    wanted, got = run_loss(theirs), run_loss(model)
    assert got.loss.dim() == 0  # the host's has shape [1], which breaks the Trainer's sum
    torch.testing.assert_close(got.loss, wanted.loss[0], rtol=1e-6, atol=0)
    for out in (wanted, got):
        out.loss.backward()
    for (name, p), q in zip(theirs.named_parameters(), model.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
            continue
        # Key biases have no gradient but rounding.
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-6, name
    loss, *rest = run_loss(model, return_dict=False)
    torch.testing.assert_close(loss, got.loss)


def test_images_without_objects():
    """The host's matcher cannot reshape the costs of no target."""
    model = ours().train()
    empty = {"mask_labels": [torch.zeros(0, 64, 96)] * 2, "class_labels": [torch.zeros(0, dtype=torch.int64)] * 2}
    out = model(**inputs(), **empty)
    out.loss.backward()
    assert torch.isfinite(out.loss).all()
    one = {"mask_labels": [torch.zeros(0, 64, 96), torch.ones(2, 64, 96)],
           "class_labels": [torch.zeros(0, dtype=torch.int64), torch.tensor([1, 4])]}  # fmt: skip
    assert torch.isfinite(model(**inputs(), **one).loss).all()
    many = labels(counts=(8, 7))  # more objects than queries
    many["class_labels"] = [label % 5 for label in many["class_labels"]]
    assert torch.isfinite(model(**inputs(), **many).loss).all()


def test_assignment_without_scipy_is_the_cheapest():
    scipy = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(0)
    for turn in range(300):
        n, m = random.integers(1, 13, 2)
        costs = random.normal(size=(n, m)) if turn % 3 else random.integers(0, 4, (n, m)).astype(float)
        rows, columns = shortest_paths(costs)
        assert (np.diff(rows) > 0).all() and len(set(columns)) == len(rows) == min(n, m)
        assert np.isclose(costs[rows, columns].sum(), costs[scipy.linear_sum_assignment(costs)].sum())


def test_invalid_predictions_are_matched_last():
    model = ours()
    out = model(**inputs())
    masks, classes = out.masks_queries_logits.detach().clone(), out.class_queries_logits.detach().clone()
    masks[:, 1], classes[:, 4] = float("nan"), float("inf")
    target = labels()
    for queries, _ in model.matcher(masks, classes, target["mask_labels"], target["class_labels"]):
        assert not {1, 4} & set(queries.tolist())


def test_gradient_checkpointing_changes_nothing():
    found = []
    for enabled in (False, True):
        model = ours(dropout=0.0).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            names = [type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            assert {"MendedEncoderLayer", "MendedDecoderLayer"} <= set(names)
        out = run_loss(model)
        out.loss.backward()
        found.append([out.loss] + [p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def _contrastive_rank(rank, world, rows, port, results):
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"tcp://127.0.0.1:{port}")
    images, texts_ = (x.requires_grad_() for x in rows[rank])
    loss = ours().criterion.loss_contrastive(images, texts_)["loss_contrastive"]
    loss.backward()
    results[rank] = (loss.item(), images.grad.tolist(), texts_.grad.tolist())
    dist.destroy_process_group()


@pytest.mark.slow
def test_contrastive_loss_over_ranks():
    """Two ranks with two images each: the mean of losses and of gradients is that of one rank with all four."""
    generator = torch.Generator().manual_seed(0)
    images, texts_ = (torch.randn(4, 6, 8, generator=generator) for _ in range(2))
    rows = [(images[:2].clone(), texts_[:2].clone()), (images[2:].clone(), texts_[2:].clone())]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_contrastive_rank, (2, rows, 29517, results), nprocs=2)
        found = dict(results)
    leaves = [x.requires_grad_() for x in (images, texts_)]
    whole = ours().criterion.loss_contrastive(*leaves)["loss_contrastive"]
    whole.backward()
    assert abs(sum(found[r][0] for r in (0, 1)) / 2 - whole.item()) < 1e-5
    for place, leaf in ((1, images), (2, texts_)):
        grads = torch.tensor(found[0][place] + found[1][place]) / 2
        torch.testing.assert_close(grads, leaf.grad, rtol=1e-4, atol=1e-6)


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


def test_neither_scipy_nor_natten_nor_torchvision():
    """Predicting and training in a process that cannot import them."""
    script = """
        import sys
        for name in ("scipy", "natten", "torchvision"):
            sys.modules[name] = None
        import torch
        from tests.models.test_oneformer import inputs, labels, ours
        model = ours("sdpa")
        with torch.no_grad():
            assert model(**inputs()).masks_queries_logits.isfinite().all()
        model.train()(**inputs(), **labels()).loss.backward()
        assert not [n for n in sys.modules if n.split(".")[0] in ("scipy", "natten", "torchvision") and sys.modules[n]]
        print("done")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0 and "done" in run.stdout, run.stderr[-2000:]


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
