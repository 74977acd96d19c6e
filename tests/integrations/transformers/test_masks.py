"""`index_mask` + `layout_from_mask` mean the same as the host's dense mask, without ever being one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers import masking_utils as host

from hf_attn.integrations.transformers import masks
from hf_attn.integrations.transformers.masks import index_mask, layout_from_mask, mask_kind
from tests.integrations.transformers.tiny import SIZES

LLAMA = SimpleNamespace(model_type="llama")
WINDOW = 3


def padding(*starts: int, length: int) -> torch.Tensor:
    """Left padding: row b is real from slot starts[b] on."""
    return torch.arange(length)[None] >= torch.tensor(starts)[:, None]


def packed_function(lengths: list[int], window: int | None = None):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    base = host.causal_mask_function if window is None else host.sliding_window_causal_mask_function(window)
    return host.and_masks(base, host.packed_sequence_mask_function(ids))


causal, sliding = host.causal_mask_function, host.sliding_window_causal_mask_function(WINDOW)
both, near = host.bidirectional_mask_function, host.sliding_window_bidirectional_mask_function(WINDOW)
# name: (q_length, kv_length, q_offset, kv_offset, mask function, 2-D mask, window)
SCENARIOS = {
    "plain": (7, 7, 0, 0, causal, None, None),
    "left padding": (7, 7, 0, 0, causal, padding(0, 3, length=7), None),
    "right padding": (7, 7, 0, 0, causal, ~padding(4, 6, length=7), None),
    "hole": (5, 5, 0, 0, causal, torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(), None),
    "all ones": (7, 7, 0, 0, causal, torch.ones(2, 7, dtype=torch.bool), None),
    "chunk": (3, 7, 4, 0, causal, None, None),
    "padded chunk": (3, 7, 4, 0, causal, padding(0, 5, length=7), None),
    "decode": (1, 7, 6, 0, causal, padding(2, 0, length=7), None),
    "static prefill": (4, 9, torch.tensor(0), 0, causal, None, None),
    "static decode": (1, 9, torch.tensor(5), 0, causal, padding(1, 0, length=6), None),
    "static chunk": (2, 9, torch.tensor([5]), 0, causal, padding(1, 0, length=7), None),
    "window": (7, 7, 0, 0, sliding, None, WINDOW),
    "window, short": (2, 2, 0, 0, sliding, None, WINDOW),
    "window, exact": (3, 3, 0, 0, sliding, None, WINDOW),
    "window, padded": (7, 7, 0, 0, sliding, padding(0, 2, length=7), WINDOW),
    "window, sliding cache": (1, 3, 6, 4, sliding, padding(5, 0, length=7), WINDOW),
    "packed": (7, 7, 0, 0, packed_function([3, 1, 3]), None, None),
    "packed window": (9, 9, 0, 0, packed_function([6, 3], WINDOW), None, WINDOW),
    "bidirectional": (7, 7, 0, 0, both, None, None),
    "bidirectional padded": (7, 7, 0, 0, both, padding(0, 2, length=7), None),
    "bidirectional window": (7, 7, 0, 0, near, padding(0, 2, length=7), WINDOW),
}


def build(config, name: str, **changes):
    q_length, kv_length, q_offset, kv_offset, function, mask, window = SCENARIOS[name]
    arguments = {
        "batch_size": 2 if mask is None else mask.shape[0],
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": mask,
        "local_size": window,
        "allow_is_causal_skip": function in (causal, sliding),
        "allow_is_bidirectional_skip": function in (both, near),
        **changes,
    }
    return index_mask(config=config, **arguments), arguments


def heads(length: int, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, 1, length, 4)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_same_visibility_as_the_host(name):
    got, arguments = build(LLAMA, name)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    want = host.sdpa_mask(**{**arguments, **skips}).expand(2, 1, -1, -1)
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    assert mask_kind(got, q_length, kv_length) not in ("dense", "pattern")
    layout = layout_from_mask(got, heads(q_length), heads(kv_length))
    visible = layout.visible("bidirectional" not in name)
    if arguments["attention_mask"] is not None and name != "bidirectional padded":
        # Queries at padded slots: the host lets them see something, here they are not real and see nothing.
        slots = torch.arange(q_length) + arguments["q_offset"]
        want = want & arguments["attention_mask"][:, slots][:, None, :, None]
    assert torch.equal(visible, want)
    if got is not None:
        assert got.dtype == torch.int32 and got.numel() <= 2 * 4 * (q_length + kv_length)


@pytest.mark.parametrize("name", ["plain", "all ones", "chunk", "window, short", "bidirectional"])
def test_nothing_to_say_is_none(name):
    assert build(LLAMA, name)[0] is None


def test_the_kind_is_in_the_shape():
    kinds = {"left padding": 2, "window": 3, "bidirectional padded": 1, "bidirectional window": 4}
    assert {name: build(LLAMA, name)[0].shape[2] for name in kinds} == kinds


def test_memory_is_linear():
    mask = index_mask(2, 16384, 16384, mask_function=causal, attention_mask=padding(0, 9, length=16384), config=LLAMA)
    assert mask.numel() == 2 * 2 * 2 * 16384


BLOCKS = torch.tensor([[-1, 0, 0, -1, -1]])
UNKNOWN = {
    "or": host.or_masks(causal, host.blockwise_overlay(BLOCKS)),
    "or inside and": host.and_masks(
        host.or_masks(causal, host.blockwise_overlay(BLOCKS)),
        host.packed_sequence_mask_function(torch.zeros(1, 5, dtype=torch.long)),
    ),
    "chunked": host.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)),
    "user's and": host.and_masks(causal, lambda b, h, q, k: k != 1),
    "user's own": lambda b, h, q, k: k <= q,
    "other window": host.sliding_window_causal_mask_function(2),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_patterns_not_understood_become_dense(name):
    """Everything unknown must be right, so it is the host's own dense mask, marked as a pattern (uint8)."""
    arguments = {"batch_size": 1, "q_length": 5, "kv_length": 5, "mask_function": UNKNOWN[name]}
    got = index_mask(**arguments, config=LLAMA, allow_is_causal_skip=False)
    assert mask_kind(got, 5, 5) == "pattern"
    layout = layout_from_mask(got, heads(5, 1), heads(5, 1))
    assert torch.equal(layout.dense, host.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_a_window_other_than_the_model_says_is_not_understood():
    arguments = {"batch_size": 1, "q_length": 5, "kv_length": 5, "mask_function": UNKNOWN["other window"]}
    got = index_mask(**arguments, local_size=3, config=LLAMA, allow_is_causal_skip=False)
    assert torch.equal(got.bool(), host.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_types_outside_the_list_get_the_host_mask():
    other = SimpleNamespace(model_type="doge")
    for name in ("left padding", "window", "packed", "static prefill", "static decode", "chunk"):
        got, arguments = build(other, name)
        want = host.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
        assert got.dtype == torch.bool and torch.equal(got, want)
    assert build(other, "plain")[0] is None and build(other, "all ones")[0] is None


def test_host_cannot_see_the_difference_through_its_own_entry_points():
    """The real callers: every argument they pass is accepted, with caches that give int and tensor offsets."""
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "hf_attn_exact"
    embeds = torch.zeros(2, 3, 32)
    for cache in (None, DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        got = host.create_causal_mask(config, embeds, torch.tensor([[0, 1, 1], [1, 1, 1]]), cache)
        assert mask_kind(got, 3, 8 if isinstance(cache, StaticCache) else 3) == "causal"
    config = MistralConfig(**{**SIZES, "sliding_window": 2})
    config._attn_implementation = "hf_attn_exact"
    assert host.create_sliding_window_causal_mask(config, embeds, None, None).shape[2] == 3


def test_a_four_dimensional_mask_passes_untouched():
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "hf_attn_exact"
    mask = build(LLAMA, "left padding")[0]
    assert host.create_causal_mask(config, torch.zeros(2, 7, 32), mask, None) is mask


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 5), torch.ones(1, 1, 5, 5, dtype=torch.long), torch.ones(1, 1, 5, 6, dtype=torch.bool)],
    ids=["2-D", "integer", "wrong length"],
)
def test_masks_of_another_kind_raise(mask):
    with pytest.raises(ValueError, match=r"attention_mask must be 2-D \[batch, tokens\], or 4-D"):
        layout_from_mask(mask, heads(5, 1), heads(5, 1))


def test_cu_seq_lens_with_a_batch_raises():
    cu = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="describes one packed row, got a batch of 2"):
        layout_from_mask(None, heads(5), heads(5), {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu})


def test_cu_seq_lens_keep_padding_of_the_mask():
    mask = index_mask(1, 6, 6, mask_function=causal, attention_mask=padding(1, length=6), config=LLAMA)
    layout = layout_from_mask(mask, heads(6, 1), heads(6, 1), {"cu_seq_lens_q": torch.tensor([0, 4, 6])})
    assert layout.index[0, 0].tolist() == [-1, 0, 0, 0, 1, 1] * 2


def test_compact_list_holds_no_type_that_reads_its_mask():
    """Types whose modeling code looks into the mask itself must never be on the list."""
    assert not masks.COMPACT_OK & {"doge", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "llama4_text"}
