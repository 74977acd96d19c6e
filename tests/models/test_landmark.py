"""Landmark models: cached retrieval against the dense form, unequal rows, conversion, tokens, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_attn
from hf_attn.caches.landmark import LandmarkStore
from hf_attn.integrations.transformers.landmark_cache import LandmarkCache
from hf_attn.mechanisms import _landmark
from hf_attn.models.landmark.configuration_landmark import chunk_tokens
from hf_attn.models.landmark.insertion import chunks
from hf_attn.training.landmark import LandmarkCollator, insert_landmarks, shift_labels, strip_landmarks
from tests.budget import assert_as_good_as_eager
from tests.integrations.transformers.tiny import SIZES
from tests.models.families import HOSTS, host, spread

LANDMARK = SIZES["vocab_size"]
# Blocks of 4 tokens and their landmark; a chunk of 10.
FIELDS = {"landmark_block_size": 5, "landmark_top_k": 2, "landmark_train_length": 25, "landmark_token_id": LANDMARK}


def build(model_type: str = "llama", **options):
    """A tiny model with large random weights."""
    extra = {"sliding_window": None} if model_type == "mistral" else {}
    fields = {**SIZES, **FIELDS, **extra, "vocab_size": LANDMARK + 1, **options}
    return spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(f"landmark_{model_type}", **fields)))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, LANDMARK, (rows, length))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.stack([torch.cat([row.new_zeros(n), row]) for n, row in zip(pad, rows, strict=True)])
    mask = torch.stack([torch.arange(width) >= n for n in pad]).long()
    return ids, mask


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_all_blocks_behind_a_cache_is_the_dense_form(model_type):
    """Specification, item 4: with k >= N, any legal chunking equals one grouped softmax."""
    model = build(model_type, landmark_top_k=20, landmark_chunk_size=10)
    ids = tokens(2, 33)
    dense = model(ids).logits
    assert dense.shape == (2, 33, LANDMARK + 1)
    assert (model(ids, use_cache=True).logits - dense).abs().max() < 1e-4
    cache, parts = LandmarkCache(model.config), []
    for part in ids.split([3, 1, 1, 1, 20, 1, 1, 1, 1, 3], 1):
        parts.append(model(part, cache=cache).logits)
    assert (torch.cat(parts, 1) - dense).abs().max() < 1e-4
    assert cache.get_seq_length() == 33 and cache.report()["tokens"] == [41, 41]


@torch.no_grad()
def test_generate_does_not_depend_on_chunks_or_offload():
    """Specification, item 7."""
    ids = tokens(2, 37)
    want = None
    for options in ({"landmark_chunk_size": 20}, {"landmark_chunk_size": 10}, {"landmark_offload": True}):
        model = build(landmark_top_k=40, **{"landmark_chunk_size": 20, **options})
        got = model.generate(ids, max_new_tokens=15, do_sample=False)
        want = got if want is None else want
        assert torch.equal(got, want) and not (got == LANDMARK).any()
    dense = model.generate(ids, max_new_tokens=15, do_sample=False, use_cache=False)
    assert torch.equal(dense, want)


@pytest.mark.parametrize("heads", ["each", "kv_group"])
@pytest.mark.parametrize("selection", ["per_token_and_head", "max_over_heads", "max_over_tokens"])
@torch.no_grad()
def test_rows_of_unequal_length_equal_rows_alone(selection, heads):
    """Rows complete their blocks at different calls; each is what it would be alone (specification, 2.4: to 1e-5)."""
    model = build(landmark_selection=selection, landmark_retrieval_heads=heads)
    rows = [tokens(1, n)[0] for n in (50, 23, 7, 41)]
    ids, mask = left_padded(rows)
    options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = model.generate(row[None], **options)
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            assert (mine[number] - theirs[0]).abs().max() < 1e-5 * theirs[0, :LANDMARK].abs().max()
    counts = hf_attn.stats(model)["totals"]["counts"]
    assert 0 < counts["decode_blocks_read"] < counts["decode_blocks_cached"]
    assert counts["blocks_read"] < counts["blocks_cached"]


def test_padding_and_packing_equal_rows_alone():
    model = build()
    rows = [tokens(1, n)[0] for n in (17, 9, 23)]
    alone = [model(row[None]).logits[0] for row in rows]
    ids, mask = left_padded(rows)
    padded = model(ids, attention_mask=mask).logits
    spare = [int(n) for n in (mask == 0).sum(1)]
    moved = [torch.stack([row.roll(-n) for row, n in zip(t, spare, strict=True)]) for t in (ids, mask)]
    right = model(moved[0], attention_mask=moved[1]).logits
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(torch.cat(rows)[None], position_ids=positions).logits[0].split([17, 9, 23])
    for number, row in enumerate(rows):
        for got in (padded[number, -len(row) :], right[number, : len(row)], packed[number]):
            assert (got - alone[number]).abs().max() < 1e-4


@torch.no_grad()
def test_beams_follow_their_rows():
    model = build(landmark_top_k=40, landmark_chunk_size=10)
    ids = tokens(2, 19)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


@torch.no_grad()
def test_memory_of_the_cache():
    """Specification, item 8: on the device landmarks, the open block and what is fetched; the rest offloaded."""
    model = build(landmark_offload=True)
    cache = LandmarkCache(model.config)
    model(tokens(1, 202), cache=cache)
    report = cache.report()
    layers, kv_heads, dim, size = 2, 2, 8, 5
    assert report["blocks"] == [50] and report["tokens"] == [252]
    assert report["bytes"]["landmarks"] == layers * kv_heads * 50 * dim * 4
    assert report["bytes"]["open"] == layers * kv_heads * size * 2 * dim * 4
    assert report["bytes"]["blocks"] == layers * kv_heads * 50 * size * 2 * dim * 4
    # Room is allocated ahead, for half as many blocks again at most.
    assert (
        report["device"]
        <= 1.5 * report["bytes"]["landmarks"] + 16 * layers * kv_heads * dim * 4 + report["bytes"]["open"]
    )
    assert report["largest_fetch"] <= 10 * 4 * 2 * size * 2 * dim * 4


@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (9, 3)])
def test_the_short_step_is_the_general_one(blocks, heads, monkeypatch):
    """One new token a row: the same blocks, and an error against fp64 as small as the general way's."""
    torch.manual_seed(0)
    size, dim, value_dim, rows = 5, 8, 6, 2
    rotary = _landmark.Rotary(1.0 / 100.0 ** (torch.arange(0, dim, 2) / dim), scaling=1.2)
    kept: list[torch.Tensor] = []
    options = _landmark.Retrieval(size, 3, keep=kept.append)
    length = blocks * size + 2
    key, value = torch.randn(rows, heads[1], length + 1, dim), torch.randn(rows, heads[1], length + 1, value_dim)
    query = torch.randn(rows, heads[0], 1, dim)
    assert _landmark._is_step(filled(key, value, size, rotary), one_token(rows), options)

    def attend(dtype: torch.dtype) -> torch.Tensor:
        states = [x.to(dtype) for x in (query, key, value)]
        store = filled(*states[1:], size, rotary)
        new = (states[1][:, :, -1:], states[2][:, :, -1:])
        return _landmark.attend_chunk(states[0], *new, store, one_token(rows), rotary, options, scale=0.3)[0]

    got = attend(torch.float32)
    monkeypatch.setattr(_landmark, "_is_step", lambda *_: False)
    assert_as_good_as_eager(got, attend(torch.float32), attend(torch.float64))
    assert torch.equal(kept[0], kept[1])


def one_token(rows: int) -> _landmark.Chunk:
    return _landmark.Chunk([1] * rows, 1, "cpu")


def filled(key: torch.Tensor, value: torch.Tensor, size: int, rotary: _landmark.Rotary) -> LandmarkStore:
    """A store with all tokens but the last."""
    store, length = LandmarkStore(size), key.shape[2] - 1
    store.hold(key[:, :, :-1], value[:, :, :-1], _landmark.Chunk([length] * key.shape[0], length, "cpu"), rotary)
    store.commit()
    return store


@torch.no_grad()
def test_fetching_in_small_steps_changes_nothing(monkeypatch):
    from hf_attn.mechanisms import _landmark as landmark

    model, ids = build(), tokens(2, 60)
    want = model(ids, use_cache=True).logits
    monkeypatch.setattr(landmark, "MAX_FETCHED", 1)
    assert (model(ids, use_cache=True).logits - want).abs().max() < 1e-5


@torch.no_grad()
def test_the_newest_blocks_stay():
    """A ring of 3 blocks equals full retrieval as long as 3 blocks are all there is, and forgets the oldest after."""
    model = build(landmark_top_k=3, landmark_chunk_size=5, landmark_max_blocks=3)
    cache = LandmarkCache(model.config)
    ids = tokens(1, 42)
    short = model(ids[:, :14], use_cache=True).logits
    model.config.landmark_max_blocks = None
    assert (short - model(ids[:, :14]).logits).abs().max() < 1e-4
    model(ids, cache=cache)
    assert cache.report()["blocks"] == [3] and cache.report()["dropped_blocks"] == [7]
    assert cache.report()["tokens"] == [52]


def test_a_step_that_fails_leaves_no_trace(monkeypatch):
    model, ids = build(), tokens(1, 30)
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        model(ids[:, :22], cache=cache)
        last = model.model.layers[1].self_attn
        monkeypatch.setattr(last, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids[:, 22:], cache=cache)
        monkeypatch.undo()
        retried = model(ids[:, 22:], cache=cache).logits
        again = LandmarkCache(model.config)
        model(ids[:, :22], cache=again)
        assert torch.equal(retried, model(ids[:, 22:], cache=again).logits)


def test_loss_is_that_of_the_collator():
    """Automatic insertion and the collator's explicit landmarks train the same; 6: lengths, labels, round trip."""
    model, ids = build(), tokens(2, 27)
    automatic = model(ids, labels=ids)
    batch = LandmarkCollator(block_size=5, landmark=LANDMARK, pad=0)([{"input_ids": row.tolist()} for row in ids])
    assert batch["input_ids"].shape == (2, 33) and (batch["input_ids"] == LANDMARK).sum() == 12
    model.config.landmark_insert = False
    given = model(**batch, use_cache=False)
    # With landmarks as tokens of the input, their logit takes part in the softmax.
    given.logits[..., LANDMARK] = torch.finfo(torch.float32).min
    loss = model.loss_function(logits=given.logits, labels=batch["labels"], vocab_size=LANDMARK + 1)
    assert abs(loss - automatic.loss) < 1e-5
    assert (batch["labels"] >= 0).sum() == 2 * 27 - 2 * 0
    everything = LandmarkCollator(5, LANDMARK, 0, include_landmark_in_loss=True)([{"input_ids": ids[0].tolist()}])
    assert (everything["labels"] == LANDMARK).sum() == 6


def test_insertion_round_trip():
    for length in range(1, 40):
        ids = list(range(2, 2 + length))
        full = insert_landmarks(ids, 5, 99)
        assert strip_landmarks(full, 99) == ids and len(full) == length + length // 4
        assert len(shift_labels(ids, 5)) == len(full)
    with pytest.raises(ValueError, match="insert them once"):
        insert_landmarks([1, 99, 2], 5, 99)
    with pytest.raises(ValueError, match="block_size must be an integer >= 2"):
        insert_landmarks([1, 2], 1, 99)
    assert chunks(23, 3, 5, 10) == [2, 10, 10, 1] and chunks(1, 3, 5, 10) == [1] and chunks(0, 3, 5, 10) == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_conversion(model_type, tied, tmp_path):
    """The host's weights and the mean row; nothing of the host changes; save and load."""
    source = host(model_type, tie_word_embeddings=tied)
    ids = tokens(2, 6)
    before = source(ids).logits
    model = hf_attn.convert(source, "landmark", block_size=8, top_k=2, train_length=64)
    assert model.config.landmark_token_id == LANDMARK == source.config.vocab_size
    rows = model.model.embed_tokens.weight
    assert torch.allclose(rows[LANDMARK], rows[:LANDMARK].mean(0), atol=1e-6)
    assert (model.lm_head.weight is rows) == tied and len(model.lm_head.weight) == LANDMARK + 1
    assert model.model.layers[0].mlp.up_proj.weight is source.model.layers[0].mlp.up_proj.weight
    # No block is complete yet, so this is the host's own attention.
    assert (model(ids).logits[..., :LANDMARK] - before).abs().max() < 1e-4
    assert torch.equal(source(ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, landmark_top_k=3, landmark_offload=True)
    assert type(loaded) is type(model) and loaded.config.landmark_top_k == 3 and loaded.config.landmark_offload
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    source.save_pretrained(tmp_path / "host")
    converted = hf_attn.convert(tmp_path / "host", "landmark", block_size=8, top_k=2, train_length=64)
    assert torch.equal(converted(ids).logits, model(ids).logits)


def test_gradient_checkpointing_and_lora():
    peft = pytest.importorskip("peft")
    model, ids = build().train(), tokens(2, 23)
    model(ids, labels=ids).loss.backward()
    want = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight.grad, want, atol=1e-6)
    options = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [LANDMARK]}}
    adapted = peft.get_peft_model(build(), peft.LoraConfig(**options))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "trainable_tokens" in n)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
        tuned = adapted.eval()(input_ids=ids).logits
        assert (adapted.merge_and_unload()(ids).logits - tuned).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmark_block_size": 1}, "landmark_block_size must be an integer >= 2"),
        ({"landmark_top_k": 0}, "landmark_top_k must be an integer >= 1"),
        ({"landmark_token_id": None}, "landmark_token_id is None"),
        ({"landmark_token_id": 5000}, "no row of an embedding"),
        ({"landmark_selection": "best"}, "landmark_selection must be one of"),
        ({"landmark_max_blocks": 0}, "landmark_max_blocks must be an integer >= 1"),
        ({"attention_dropout": 0.1}, "no attention dropout"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "cannot move keys"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refusals():
    model, ids = build(), tokens(1, 9)
    with pytest.raises(ValueError, match="the input holds the landmark"):
        model(torch.tensor([[1, LANDMARK, 2]]))
    with pytest.raises(TypeError, match="need a LandmarkCache, got DynamicCache"):
        model(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="take input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="1 for real tokens"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="cannot hold landmarks"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="ignores attn_implementation"):
        hf_attn.apply(model, "moba")
    cache = LandmarkCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="holds 1 rows, the input has 2"):
        model(tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match="cannot forget single tokens"):
        cache.crop(-1)
    model.config.landmark_insert = False
    with pytest.raises(ValueError, match="runs without a cache"):
        model(ids, use_cache=True)
    assert chunk_tokens(model.config) == 10
    model.config.landmark_top_k = 4
    with pytest.raises(ValueError, match="has no room for a chunk"):
        chunk_tokens(model.config)
    for wrong, message in (
        ({"blocksize": 4}, "did you mean 'block_size'"),
        ({"token_id": LANDMARK + 5}, "leaves a gap"),
        ({"train_length": 64, "block_size": 64}, "has no room for a chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_attn.convert(host("llama"), "landmark", **wrong)
    with pytest.raises(ValueError, match="sliding windows"):
        hf_attn.convert(host("mistral", sliding_window=4), "landmark", block_size=4, train_length=64)
