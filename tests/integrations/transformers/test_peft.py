"""LoRA on a model that uses a mechanism: a training step, and the adapter on a reloaded base."""

from __future__ import annotations

import pytest
import torch

import hf_attn

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "options"),
    [("moba", {"block_size": 8, "top_k": 2, "min_seq_len": 0}), ("streaming", {"window": 16, "block_size": 8})],
)
def test_lora_step_and_reload(name, options, tiny_model, tmp_path, sparse_path):
    from transformers import AutoModelForCausalLM

    base = hf_attn.apply(AutoModelForCausalLM.from_pretrained(tiny_model), name, **options)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(0, 256, (2, 60))
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert hf_attn.stats(base)["totals"]["sparse_calls"] == 3 * 2
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert fresh.config._attn_implementation == f"hf_attn_{name}"
    fresh = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits)
