"""The kernel's attention function is SDPA under every mask it takes, and refuses the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn.ops.hfattn_sparse import attention, flash_attn_forward

CAUSAL, BIDIRECTIONAL = SimpleNamespace(is_causal=True), SimpleNamespace(is_causal=False)


def inputs(q_len: int, k_len: int, batch: int = 2, value_dim: int = 16) -> list[Tensor]:
    sizes = ((4, q_len, 8), (2, k_len, 8), (2, k_len, value_dim))
    return [torch.randn(batch, *size, requires_grad=True) for size in sizes]


def causal_rows(q_len: int, k_len: int) -> Tensor:
    return torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)[None, None]


def padded(starts: list[int], ends: list[int], length: int, causal: bool) -> Tensor:
    slots = torch.arange(length)
    real = (slots >= torch.tensor(starts)[:, None]) & (slots < torch.tensor(ends)[:, None])
    mask = real[:, None, None, :].expand(-1, 1, length, -1)
    return (mask & causal_rows(length, length)) if causal else mask


def documents(lengths: list[int], causal: bool) -> Tensor:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (ids[:, None] == ids)[None, None]
    return mask & causal_rows(len(ids), len(ids)) if causal else mask


def static_cache(q_len: int, filled: int, slots: int) -> Tensor:
    mask = torch.zeros(1, 1, q_len, slots, dtype=torch.bool)
    mask[..., :filled] = causal_rows(q_len, filled)
    return mask


MASKS = {
    "causal": (150, 150, causal_rows(150, 150)),
    "causal behind a cache": (7, 150, causal_rows(7, 150)),
    "left padding": (140, 140, padded([0, 9], [140, 140], 140, True)),
    "right padding": (140, 140, padded([0, 0], [140, 99], 140, True)),
    "bidirectional padding": (140, 140, padded([0, 3], [140, 99], 140, False)),
    "a row of padding": (20, 20, padded([0, 20], [20, 20], 20, True)),
    "documents": (142, 142, documents([3, 130, 9], True)),
    "documents, bidirectional": (142, 142, documents([3, 130, 9], False)),
    "static cache": (6, 160, static_cache(6, 140, 160)),
    "static cache, one token": (1, 160, static_cache(1, 140, 160)),
    "full": (33, 150, torch.ones(1, 1, 33, 150, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_transformers(name):
    q_len, k_len, mask = MASKS[name]
    query, key, value = inputs(q_len, k_len)
    out, weights = flash_attn_forward(CAUSAL, query, key, value, mask, scaling=0.3)
    assert weights is None and out.shape == (2, q_len, 4, 16) and out.is_contiguous()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    # Rows of padding: SDPA lets some of them see what the last token sees; nobody reads them.
    index, _ = attention.token_index(mask[:, 0].expand(2, q_len, k_len))
    real = (index[:, 0, :q_len] >= 0)[:, None, :, None]
    results = (torch.where(real, out.transpose(1, 2), 0), torch.where(real, expected, 0))
    torch.testing.assert_close(*results)
    assert bool((out.transpose(1, 2).masked_select(~real) == 0).all())
    grads = [torch.autograd.grad(result.square().sum(), (query, key, value)) for result in results]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, torch.nan_to_num(wanted))


@pytest.mark.parametrize(
    ("module", "q_len", "k_len"), [(CAUSAL, 130, 130), (CAUSAL, 1, 130), (BIDIRECTIONAL, 130, 130)]
)
def test_without_a_mask(module, q_len, k_len):
    query, key, value = inputs(q_len, k_len)
    out, _ = flash_attn_forward(module, query, key, value, None, sliding_window=4096, position_ids=torch.arange(q_len))
    causal = module.is_causal and q_len > 1
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    again, _ = flash_attn_forward(CAUSAL, query, key, value, None, is_causal=causal)
    torch.testing.assert_close(again, out)


def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    calls = []
    original = attention.token_index
    monkeypatch.setattr(attention, "token_index", lambda mask: calls.append(1) or original(mask))
    query, key, value = inputs(20, 20)
    mask = documents([8, 12], True)
    results = [flash_attn_forward(CAUSAL, query, key, value, mask)[0] for _ in range(3)]
    assert len(calls) == 1 and torch.equal(results[0], results[2])
    mask[..., 15, 15] = False
    with pytest.raises(ValueError, match="its last tokens"):
        flash_attn_forward(CAUSAL, query, key, value, mask)


def window(length: int, size: int) -> Tensor:
    return causal_rows(length, length).triu(1 - size)


REFUSED = {
    "dropout": ({"dropout": 0.1}, "without dropout, got dropout=0.1"),
    "softcap": ({"softcap": 30.0}, "without soft-capping of the scores"),
    "sinks": ({"s_aux": torch.ones(4)}, "without attention sinks"),
    "bias": ({"position_bias": torch.ones(1)}, "without an additive position bias"),
    "packed": ({"cu_seq_lens_q": torch.tensor([0, 4, 20])}, "without packed sequences without a mask"),
    "weights": ({"output_attentions": True}, "without attention weights"),
    "window": ({"sliding_window": 8}, "without a sliding window of 8 tokens over 20 keys"),
    "window mask": ({"attention_mask": window(20, 8)}, "without arbitrary masks and sliding windows"),
    "float mask": ({"attention_mask": torch.zeros(2, 1, 20, 20)}, "attention_mask must be None or bool"),
    "head mask": ({"attention_mask": torch.ones(2, 4, 20, 20).bool()}, "attention_mask must be None or bool"),
    "short mask": ({"attention_mask": torch.ones(2, 1, 20, 19).bool()}, "attention_mask must be None or bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_honour_is_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        flash_attn_forward(CAUSAL, *inputs(20, 20), **options)
