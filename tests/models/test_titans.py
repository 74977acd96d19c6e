"""Titans: every variant in one call and in many, causality, padding, generation, states, round trips, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attn  # noqa: F401  registers the model type
from hf_attn.integrations.transformers.cache import cache_argument
from hf_attn.integrations.transformers.memory import TitansCache
from hf_attn.integrations.transformers.recurrent import RecurrentCache
from hf_attn.models.conversion import enable_checkpointing
from hf_attn.models.titans import NeuralMemory, TitansConfig, TitansForCausalLM

VARIANTS = ("lmm", "mag", "mal", "mac")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "memory_num_heads": 2,
    "memory_inner_size": 24,
    "memory_chunk_size": 4,
    "theta_max": 0.4,
    "num_persistent_tokens": 2,
    "segment_size": 6,
    "window": 5,
    "bos_token_id": None,
    "eos_token_id": None,
}
# One bound is wider than the sequence, or there is nothing to see; the exact recurrence.
CORNERS = [
    {"variant": "mag", "num_persistent_tokens": 0},
    {"variant": "mag", "window": 100},
    {"variant": "mag", "window": 1},
    {"variant": "mal", "num_persistent_tokens": 0, "window": 1},
    {"variant": "mac", "segment_size": 100},
    {"variant": "mac", "num_persistent_tokens": 0, "segment_size": 4},
    {"variant": "mac", "segment_size": 1, "memory_chunk_size": 1},
    {"variant": "lmm", "conv_kernel": 0},
    {"variant": "lmm", "conv_kernel": 1, "memory_depth": 1},
    {"variant": "mac", "conv_kernel": 0, "memory_chunk_size": 3},
    {"variant": "mal", "memory_depth": 3, "memory_chunk_size": 64},
    {"variant": "mag", "memory_chunk_size": 1},
]


def tiny(**options) -> TitansForCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TitansConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "memory.memory" not in name:
                weight.normal_(0, 0.25)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_calls(model: TitansForCausalLM, tokens: torch.Tensor, lengths: list[int], **options) -> torch.Tensor:
    """Logits of a sequence that comes in pieces."""
    cache, parts, start = TitansCache(model.config.num_hidden_layers), [], 0
    for length in lengths:
        piece = tokens[:, start : start + length]
        parts.append(model(piece, past_key_values=cache, **options).logits)
        start += length
    assert start == tokens.shape[1] == cache.get_seq_length()
    return torch.cat(parts, 1)


def check_splits(model: TitansForCausalLM, tokens: torch.Tensor, prompts: list[int], atol: float) -> None:
    whole = model(tokens, use_cache=False).logits
    assert whole.std() > 0.1
    for prompt in prompts:
        logits = in_calls(model, tokens, [prompt] + [1] * (40 - prompt))
        torch.testing.assert_close(logits, whole, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_splits_of_a_sequence_are_the_whole(variant):
    """A prompt and single steps, or pieces: the splits lie inside chunks, windows and segments, and at their ends."""
    model, tokens = tiny(variant=variant).double(), ids(2, 40)
    check_splits(model, tokens, [1, 4, 13, 24], 1e-9)
    whole = model(tokens, use_cache=False).logits
    torch.testing.assert_close(in_calls(model, tokens, [7, 13, 1, 19]), whole, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_split_in_fp32(variant):
    """Weights as large as those of a trained model: 1 / sqrt(fan_in)."""
    model, tokens = tiny(variant=variant), ids(1, 40)
    for name, weight in model.named_parameters():
        if "norm" not in name and "memory.memory" not in name:
            weight.mul_(0.7)
    check_splits(model, tokens, list(range(1, 40)), 1e-4)


@pytest.mark.parametrize("options", CORNERS, ids=lambda o: "-".join(map(str, o.values())))
@torch.no_grad()
def test_corners(options):
    model, tokens = tiny(**options).double(), ids(1, 11)
    whole = model(tokens, use_cache=False).logits
    assert whole.isfinite().all()
    torch.testing.assert_close(in_calls(model, tokens, [1, 5, 1, 4]), whole, rtol=0, atol=1e-9)
    for length in (1, 2, 3, 5, 7):
        part = model(tokens[:, :length], use_cache=False).logits
        torch.testing.assert_close(part, whole[:, :length], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_no_token_sees_the_future(variant):
    """Inside segments too: with the literal equations of MAC it would."""
    model, tokens = tiny(variant=variant), ids(1, 17)
    whole = model(tokens, use_cache=False).logits
    for changed in (0, 2, 5, 6, 11, 16):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] - 2) % 94 + 3
        difference = (model(other, use_cache=False).logits - whole).abs().amax(-1)[0]
        assert difference[:changed].sum() < 1e-6 and difference[changed:].max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_anywhere_and_in_pieces(variant):
    model = tiny(variant=variant).double()
    rows = [ids(1, 17), ids(1, 9, seed=2), ids(1, 3, seed=3)]
    alone = [model(row).logits[0] for row in rows]
    for side in ("left", "right", "anywhere"):
        tokens, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
        for index, row in enumerate(rows):
            count = row.shape[1]
            places = torch.arange(count) + (19 - count if side == "left" else 0)
            if side == "anywhere":
                places = torch.randperm(19, generator=torch.Generator().manual_seed(index))[:count].sort().values
            tokens[index, places], mask[index, places] = row[0], 1
        whole = model(tokens, attention_mask=mask).logits
        cache, parts = TitansCache(2), []
        for start, stop in ((0, 5), (5, 6), (6, 13), (13, 14), (14, 19)):
            parts.append(model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        assert whole.isfinite().all() and torch.cat(parts, 1).isfinite().all()
        for index, logits in enumerate(alone):
            real = mask[index].bool()
            torch.testing.assert_close(whole[index, real], logits, rtol=0, atol=1e-9)
            torch.testing.assert_close(torch.cat(parts, 1)[index, real], logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_generation_with_and_without_a_cache(variant):
    """Greedy and beams, rows of unequal length."""
    model = tiny(variant=variant)
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4], tokens[0, :4] = 0, 0
    for search in ({}, {"num_beams": 3}):
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **search}
        with_cache = model.generate(tokens, use_cache=True, **arguments)
        assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **arguments))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_selected(variant):
    model = tiny(variant=variant).double()
    tokens = ids(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    whole = model(tokens, attention_mask=mask).logits[:, 9:]
    cache = TitansCache(2)
    model(tokens[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 0, 3, 2, 5, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    rows = torch.tensor([2, 0, 1])
    got = model(tokens[rows, 9:], attention_mask=mask[rows], past_key_values=cache).logits
    torch.testing.assert_close(got, whole[rows], rtol=0, atol=1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(tokens[:1], past_key_values=cache).logits[:, 9:], whole[:1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_stream_goes_on_from_a_file(variant, tmp_path):
    model, tokens = tiny(variant=variant), ids(1, 15)
    cache = TitansCache(2)
    model(tokens[:, :8], past_key_values=cache)
    cache.save(tmp_path / "states.safetensors")
    rest = model(tokens[:, 8:], past_key_values=cache).logits
    loaded = TitansCache(2).load(tmp_path / "states.safetensors")
    assert loaded.get_seq_length() == 8
    assert torch.equal(model(tokens[:, 8:], past_key_values=loaded).logits, rest)
    longer = model.generate(tokens, **{cache_argument(model): TitansCache(2)}, max_new_tokens=3, do_sample=False)
    assert torch.equal(longer, model.generate(tokens, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_frozen_memory_is_read_and_not_written(variant):
    model, tokens = tiny(variant=variant), ids(1, 20)
    cache = TitansCache(2)
    model(tokens[:, :9], past_key_values=cache)
    before = {name: t.clone() for name, t in cache.layers[1].state.carried().items() if "weights" in name}
    learning = model(tokens, use_cache=False).logits[:, 9:]
    frozen = model(tokens[:, 9:], past_key_values=cache, freeze_memory=True).logits
    after = cache.layers[1].state.carried()
    assert before and all(torch.equal(after[name], t) for name, t in before.items())
    assert (frozen - learning).abs().max() > 1e-3
    cache = TitansCache(2)
    model(tokens[:, :9], past_key_values=cache)
    model.config.freeze_memory = True
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(9, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), frozen, rtol=0, atol=1e-5)
    assert model.generate(tokens, max_new_tokens=3, freeze_memory=True).shape == (1, 23)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bf16_keeps_an_exact_memory_of_constant_size(variant):
    model = tiny(variant=variant).bfloat16()
    cache, sizes = TitansCache(2), set()
    for _ in range(4):
        assert model(ids(1, 24), past_key_values=cache).logits.isfinite().all()
        sizes.add(cache.bytes())
    assert len(sizes) == 1
    states = cache.layers[1].state.carried()
    sums = ("weights.", "momentum.", "chunk_start_weights.")
    assert all(states[f"{name}0"].dtype == torch.float32 for name in sums)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_stream_of_64k_tokens_needs_no_more_memory(variant):
    """And bf16 losses over 4096 tokens are finite, with gates of a new model: random ones take steps that diverge."""
    options = {**SIZES, "variant": variant, "memory_chunk_size": 64, "segment_size": 64}
    model = AutoModelForCausalLM.from_config(TitansConfig(**options)).eval().bfloat16()
    tokens = ids(1, 4096)
    assert model(tokens, labels=tokens, use_cache=False).loss.isfinite()
    cache, sizes = TitansCache(2), []
    for _ in range(64):
        assert model(tokens[:, :1024], past_key_values=cache).logits.isfinite().all()
        sizes.append(cache.bytes())
    assert len(set(sizes)) == 1 and cache.get_seq_length() == 65536


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reaches_every_weight(variant, checkpointing):
    model, batch = tiny(variant=variant).train(), ids(2, 13)
    plain = model(batch, labels=batch).loss
    plain.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert plain.isfinite() and all(g.abs().sum() > 0 for g in grads.values())
    if checkpointing:
        model.zero_grad()
        enable_checkpointing(model)
        model(batch, labels=batch).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_training_goes_on_with_a_carried_memory():
    """Truncated backpropagation: a second part learns behind the memory of the first."""
    model, batch = tiny(variant="mag").train(), ids(2, 20)
    cache = TitansCache(2)
    for part in batch.split(10, 1):
        loss = model(part, labels=part, past_key_values=cache).loss
        loss.backward()
    assert loss.isfinite() and cache.get_seq_length() == 20
    assert not any(t.requires_grad for t in cache.layers[0].state.carried().values() if torch.is_tensor(t))


def test_eager_and_sdpa_agree_and_others_are_refused():
    tokens = ids(1, 23)
    for variant in ("mag", "mal", "mac"):
        model = tiny(variant=variant)
        assert model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            expected = model(tokens).logits
            model.set_attn_implementation("eager")
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="attn_implementation"):
        AutoModelForCausalLM.from_config(TitansConfig(**SIZES), attn_implementation="hf_attn_moba")


def test_long_windows_are_computed_in_blocks():
    """24 tokens are more than two windows of 5, 8 are not: one path against the other, with padding and a past."""
    model, tokens = tiny(variant="mag"), ids(2, 24)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        torch.testing.assert_close(in_calls(model, tokens, [8, 8, 8]), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_calls(model, tokens, [2, 22]), whole, rtol=0, atol=1e-5)
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0
        moved = model(tokens, attention_mask=mask, use_cache=False).logits[1, 3:]
        torch.testing.assert_close(moved, model(tokens[1:, 3:]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    model = tiny(variant=variant, tie_word_embeddings=variant == "mac")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_hf_attn.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is TitansForCausalLM and AutoConfig.from_pretrained(tmp_path).variant == variant
    tokens = ids(1, 8)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    through_file = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(through_file(tokens).logits, model(tokens).logits)


def test_new_weights():
    """Gates begin with small steps, some momentum and little forgetting; the memory is not zero, and training works."""
    model = AutoModelForCausalLM.from_config(TitansConfig(**SIZES))
    memory = model.model.layers[0].mixer.memory
    biases = [getattr(memory, f"{name}_proj").bias[0].item() for name in ("theta", "eta", "alpha")]
    assert biases == [-2, 0, -4] and torch.equal(memory.norm, torch.ones(16))
    assert [round(w.std().item() * w.shape[1] ** 0.5, 1) for w in memory.memory] == [1.0, 1.0]
    assert model(ids(1, 9), labels=ids(1, 9)).loss.item() == pytest.approx(4.6, abs=0.4)


def test_the_layer_stands_alone():
    layer = NeuralMemory(32, 2, inner_size=24, chunk_size=4)
    hidden = torch.randn(2, 10, 32)
    whole, _ = layer(hidden)
    first, state = layer(hidden[:, :3])
    second, _ = layer(hidden[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="may diverge"):
        NeuralMemory(32, 2, chunk_size=64, theta_max=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralMemory(32, 2, chunk_size=64, theta_max=0.1)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"variant": "magg"}, "did you mean 'mag'"),
        ({"memory_chunk_size": 0}, "memory_chunk_size"),
        ({"memory_depth": 0}, "memory_depth"),
        ({"memory_num_heads": 5}, "memory_num_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": 36, "num_attention_heads": 12}, "even head size"),
        ({"variant": "mac", "segment_size": 3}, "segment_size"),
        ({"window": 0}, "window"),
        ({"theta_max": 0.0}, "theta_max"),
    ],
)
def test_bad_configs_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        TitansForCausalLM(TitansConfig(**{**SIZES, **fields}))


@torch.no_grad()
def test_misuse_of_the_cache_is_named():
    model, tokens = tiny(), ids(1, 6)
    cache = TitansCache(2)
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="another batch"):
        model(ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="another model"):
        tiny(memory_inner_size=20)(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="TitansCache"):
        model(tokens, past_key_values=RecurrentCache(2))
    with pytest.raises(ValueError, match="float32 or float64"):
        cache.layers[0].state.keep(1, {"weights.0": torch.zeros(1, 2, 16, 24, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="mask of pairs"):
        model(tokens, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="packed"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(ValueError, match=r"(?i)assisted|stateful"):
        model.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert cache.get_seq_length() == 6
