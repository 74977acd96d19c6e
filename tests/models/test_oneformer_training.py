"""OneFormer in training: losses, assignment, text, dropout, checkpointing, several ranks."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_attn.integrations.transformers.repairs.oneformer.assignment import shortest_paths
from tests.models.oneformer_models import inputs, labels, ours, stock, texts


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


@pytest.mark.skipif(version("transformers").startswith("5.17."), reason="the host has no loss without text in 5.17")
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
