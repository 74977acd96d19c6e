"""The memory branch of pretrained decoders: it begins as nothing, follows every cache, pads, saves and trains alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hf_attn
from tests.models.families import HOSTS, host

OPTIONS = {"layers": [1], "num_heads": 2, "inner_size": 12, "chunk_size": 4, "theta_max": 0.4}


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def converted(name: str = "llama", gain: float = 0.5):
    model = hf_attn.convert(host(name), "titans", **OPTIONS).eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.titans.gain.fill_(gain)
    return model


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_a_new_branch_changes_nothing(name, tmp_path):
    base, tokens = host(name), ids(2, 11)
    model = hf_attn.convert(host(name), "titans", **OPTIONS).eval()
    assert type(model).__name__.startswith("Titans") and model.model.layers[0].self_attn.titans is None
    assert torch.equal(model(tokens).logits, base(tokens).logits)
    model.model.layers[1].self_attn.titans.gain.fill_(0.5)
    changed = model(tokens).logits
    assert changed.isfinite().all() and (changed - base(tokens).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and torch.equal(again(tokens).logits, changed)


@torch.no_grad()
def test_pieces_padding_and_beams():
    model, tokens = converted(), ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    alone = model(tokens[1:, 5:], use_cache=False).logits
    torch.testing.assert_close(whole[1:, 5:], alone, rtol=0, atol=1e-4)
    cache, parts = DynamicCache(), []
    for start, stop in ((0, 3), (3, 9), (9, 10), (10, 12)):
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
        parts.append(model(tokens[:, start:stop], **given).logits)
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[:1], whole[:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(got[1:, 5:], whole[1:, 5:], rtol=0, atol=1e-4)
    for search in ({}, {"num_beams": 3}):
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **search}
        with_cache = model.generate(tokens, use_cache=True, **arguments)
        assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **arguments))


def test_only_the_memory_trains():
    model = hf_attn.convert(host("llama"), "titans", **OPTIONS).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(".titans." in name)
    tokens = ids(2, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the gain moves first, and what is behind it in the second step
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    grads = [p.grad for name, p in model.named_parameters() if ".titans." in name]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None for name, p in model.named_parameters() if ".titans." not in name)


@torch.no_grad()
def test_misuse_is_named():
    model, tokens = converted(), ids(1, 6)
    with pytest.raises(ValueError, match="did you mean 'chunk_size'"):
        hf_attn.convert(host("llama"), "titans", chunk_siz=4)
    with pytest.raises(ValueError, match="titans_layers names layer 9"):
        hf_attn.convert(host("llama"), "titans", layers=[9])
    with pytest.raises(ValueError, match="num_heads=5"):
        hf_attn.convert(host("llama"), "titans", num_heads=5)
    cache = DynamicCache()
    host("llama")(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="not what memories read"):
        model(tokens, past_key_values=cache)
    cache = DynamicCache()
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="packed"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
