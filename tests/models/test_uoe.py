"""Unions of experts: dense when all are chosen, caches, padding, batches, the way back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import hf_attn
from hf_attn.integrations.transformers.cache import cache_argument
from hf_attn.models.conversion import enable_checkpointing
from hf_attn.models.uoe import UoeCache, UoeLlamaConfig, UoeLlamaForCausalLM, merge_to_dense, order_neurons
from hf_attn.models.uoe.conversion import balanced_clusters
from hf_attn.nn.experts import (
    SelectiveMultiHeadAttention,
    UnionOfMlpExperts,
    gate_weights,
    pool_patches,
    route,
)
from tests.integrations.transformers.tiny import tokens
from tests.models.families import HOSTS, host, spread

SPARSE = {"attn_top_k": 1, "mlp_experts": 4, "mlp_top_k": 2}


def converted(model_type="llama", **options):
    model = hf_attn.convert(host(model_type), "uoe", **{**SPARSE, **options})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "uoe_gate" in name:
                weight.normal_(0, 1, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("gate_mode", ["ste", "none"])
@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_all_experts_are_the_dense_model(model_type, gate_mode):
    base = host(model_type)
    heads = base.config.num_key_value_heads
    model = hf_attn.convert(base, "uoe", attn_top_k=heads, mlp_experts=4, mlp_top_k=4, gate_mode=gate_mode)
    ids = tokens(2, 13)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_gives_back_the_very_weights(tmp_path):
    base = host("llama")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    dense = merge_to_dense(hf_attn.convert(base, "uoe", **SPARSE))
    assert type(dense) is type(base) and dense.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in dense.state_dict().items())
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 9)
    assert type(again) is type(base) and torch.equal(again(ids).logits, base(ids).logits)
    with pytest.raises(TypeError, match="converted with 'uoe'"):
        merge_to_dense(base)


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_decoding_equals_the_whole_sequence(model_type):
    """Token by token and in chunks, with the host's caches."""
    model, ids = converted(model_type), tokens(2, 12)
    whole = model(ids).logits
    step = model(ids[:, :5], use_cache=True)
    name = "cache" if getattr(step, "cache", None) is not None else "past_key_values"
    cache, parts = getattr(step, name), [step.logits]
    for start, stop in ((5, 9), (9, 10), (10, 11), (11, 12)):
        parts.append(model(ids[:, start:stop], **{name: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    static = StaticCache(config=model.config, max_cache_len=16)
    parts = [model(ids[:, a:b], **{name: static}).logits for a, b in ((0, 5), (5, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_a_cache_of_chosen_tokens(model_type):
    """Same logits and tokens; it holds what the experts chose, survives crops, and refuses other models' steps."""
    model, ids = converted(model_type, always_select_first=0), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, parts = UoeCache(model.config), []
    name = cache_argument(model)

    def step(start, stop):
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], name: cache}
        return model(ids[:, start:stop], **given).logits

    for start, stop in ((0, 5), (5, 9), (9, 10), (10, 12)):
        parts.append(step(start, stop))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
    stored = sum(layer.store.entries() for layer in cache.layers)
    experts = model.config.num_key_value_heads
    assert stored == model.config.num_hidden_layers * int(real.sum()) == 2 * int(real.sum()) and experts == 2
    cache.crop(-3)
    torch.testing.assert_close(step(9, 12)[real[:, 9:]], whole[:, 9:][real[:, 9:]], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="another batch"):
        model(ids[:1, :1], **{name: cache})
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 2, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **arguments)
    fresh = {name: UoeCache(model.config)}
    assert torch.equal(model.generate(ids, attention_mask=mask, **fresh, **arguments), expected)


@pytest.mark.parametrize("model_type", HOSTS)
@torch.no_grad()
def test_experts_that_share_a_kv_head(model_type, tmp_path):
    """One query head an expert: dense when all are chosen, the definition otherwise, and every cache gives it too."""
    base, ids = host(model_type), tokens(2, 12)
    heads, kv_heads = base.config.num_attention_heads, base.config.num_key_value_heads
    assert heads > kv_heads
    whole = hf_attn.convert(base, "uoe", attn_top_k=heads, kv_shared=True)
    assert whole.model.layers[0].self_attn.uoe_gate.out_features == heads
    torch.testing.assert_close(whole(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(merge_to_dense(whole)(ids).logits, base(ids).logits)

    model = converted(model_type, attn_top_k=heads // 2, mlp_top_k=None, kv_shared=True, always_select_first=0)
    with torch.no_grad():  # a twin with a KV head of its own for every query head
        config = type(base.config)(**{**base.config.to_dict(), "num_key_value_heads": heads})
        twin = type(base)(config)
        weights = base.state_dict()
        for name, weight in weights.items():
            if ".k_proj." in name or ".v_proj." in name:
                parts = weight.unflatten(0, (kv_heads, -1))
                weights[name] = parts.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
        twin.load_state_dict(weights)
        twin = hf_attn.convert(twin.eval(), "uoe", attn_top_k=heads // 2, always_select_first=0)
        for name, weight in model.named_parameters():
            if "uoe_gate" in name:
                twin.get_parameter(name).copy_(weight)
    want = twin(ids).logits
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    name = cache_argument(model)
    for cache in (UoeCache(model.config), StaticCache(config=model.config, max_cache_len=16), None):
        if cache is None:
            first = model(ids[:, :5], use_cache=True)
            cache, parts = getattr(first, name), [first.logits]
        else:
            parts = [model(ids[:, :5], **{name: cache}).logits]
        parts += [model(ids[:, a:b], **{name: cache}).logits for a, b in ((5, 9), (9, 10), (10, 12))]
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_shared_kv_head_keeps_the_tokens_of_any_expert():
    model, ids = converted(attn_top_k=1, mlp_top_k=None, kv_shared=True, always_select_first=0), tokens(2, 12)
    cache = UoeCache(model.config)
    model.train()  # keeps the routing
    model(ids, **{cache_argument(model): cache})
    for layer, store in zip(model.model.layers, (layer.store for layer in cache.layers), strict=True):
        selected = layer.self_attn.routing.selected.transpose(1, 2)
        union = selected.unflatten(1, (model.config.num_key_value_heads, -1)).any(2)
        assert store.entries() == int(union.sum()) < union.numel()


@torch.no_grad()
def test_generation_with_and_without_a_cache():
    model, ids = converted(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for search in ({}, {"num_beams": 3}):
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **search}
        arguments["pad_token_id"] = 0
        assert torch.equal(
            model.generate(ids, use_cache=True, **arguments), model.generate(ids, use_cache=False, **arguments)
        )


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch():
    model = converted()
    rows = [tokens(1, n, seed=n) for n in (11, 7, 3)]
    alone = [model(row).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(11 - row.shape[1], 11) if side == "left" else slice(0, row.shape[1])
            ids[index, place], mask[index, place] = row[0], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for index, expected in enumerate(alone):
            torch.testing.assert_close(logits[index, mask[index].bool()], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_rows_are_separate_sequences():
    model = converted()
    first, second = tokens(1, 6), tokens(1, 5, seed=2)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_size", [1, 3])
@torch.no_grad()
def test_the_future_changes_nothing(patch_size):
    model, ids = converted(patch_size=patch_size), tokens(1, 12)
    before = model(ids, use_cache=False).logits
    for cut in (1, 4, 7):
        other = ids.clone()
        other[:, cut:] = tokens(1, 12 - cut, seed=5)
        after = model(other, use_cache=False).logits
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-5)
    if patch_size > 1:
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, use_cache=True)


@pytest.mark.parametrize("mode", ["ste", "sum", "scaled", "none"])
def test_gates_get_gradients_except_in_mode_none(mode):
    model = converted(gate_mode=mode, balance=0.0).train()
    ids = tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    gates = [w.grad for n, w in model.named_parameters() if "uoe_gate.weight" in n]
    assert len(gates) == 2 * model.config.num_hidden_layers
    if mode == "none":
        assert all(g is None or not g.any() for g in gates)  # selection alone: the released model's routers stay put
    else:
        assert all(g is not None and g.abs().sum() > 0 for g in gates)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_holds_the_balance_of_the_gates(checkpointing):
    model = converted(gate_mode="none", balance=0.5).train()
    if checkpointing:
        enable_checkpointing(model)
    ids = tokens(2, 10)
    outputs = model(ids, labels=ids)
    plain = model(ids).logits
    cross = model.loss_function(logits=plain, labels=ids, vocab_size=model.config.vocab_size)
    torch.testing.assert_close(outputs.loss, cross + 0.5 * outputs.aux_loss)
    outputs.loss.backward()
    assert all(w.grad.abs().sum() > 0 for n, w in model.named_parameters() if "uoe_gate" in n)
    assert not hasattr(model.eval()(ids, labels=ids), "aux_loss")


@torch.no_grad()
def test_adapters_take_the_masked_path_to_the_same_result():
    from peft import LoraConfig, get_peft_model

    model, ids = converted(), tokens(2, 9)
    before = model(ids).logits
    names = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=names, task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-4)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(0, 0.1)
    changed = adapted(ids).logits
    assert (changed - before).abs().max() > 1e-2
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, changed, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gates_fitted_to_text_beat_random_ones():
    """The chosen expert is the one that contributes most, more often than by chance."""
    base, ids = host("llama"), tokens(4, 64)
    model = hf_attn.convert(base, "uoe", **SPARSE, calibration=ids)
    hits, chance = 0, 0
    for layer in model.model.layers:
        seen = {}
        handle = layer.mlp.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(x=a[0]))
        model(ids)
        handle.remove()
        x = seen["x"]
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        parts = zip(inner.chunk(4, -1), layer.mlp.down_proj.weight.chunk(4, 1), strict=True)
        best = torch.stack([(p @ w.T).norm(dim=-1) for p, w in parts], -1).argmax(-1)
        hits += int((layer.mlp.uoe_gate(x).argmax(-1) == best).sum())
        chance += best.numel() / 4
    assert hits > 1.3 * chance


@torch.no_grad()
def test_ordering_neurons_keeps_the_function_and_groups_alike():
    model, ids = host("llama"), tokens(2, 40)
    before = model(ids).logits
    order_neurons(model, ids, 4)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    groups = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    points = groups.repeat(4, 1) + 0.01 * torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    order = balanced_clusters(points, 3)
    assert sorted(order.tolist()) == list(range(12))
    assert all(len({int(i) % 3 for i in run}) == 1 for run in order.chunk(3))


def test_round_trip(tmp_path):
    model, ids = converted(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is UoeLlamaForCausalLM and torch.equal(again(ids).logits, model(ids).logits)


def test_routing_follows_its_definitions():
    logits = torch.tensor([[[2.0, 1, 1], [0, 3, 3], [1, 1, 1]]])
    found = route(logits, 2, real=torch.tensor([[True, True, False]]))
    assert found.chosen.tolist() == [[[True, True, False], [False, True, True], [False] * 3]]
    forced = route(logits, 1, forced=torch.tensor([[True, False, False]]))
    assert forced.chosen[0, 0].all() and forced.chosen[0, 1].tolist() == [False, True, False]
    p = found.probabilities
    scaled = gate_weights(found, "scaled")
    assert scaled[0, 0, 0] == pytest.approx(2 * float(p[0, 0, 0] / (p[0, 0, 0] + p[0, 0, 1])))
    assert not scaled[0, 2].any()
    taken = route(torch.randn(2, 10, 3), 1, selection="expert_choice", capacity=0.3).selected
    assert bool((taken.sum(1) <= 3).all())
    x = torch.arange(10.0).view(1, 5, 2)
    assert pool_patches(x, 2, True)[0, :, 0].tolist() == [0, 4, 8]
    assert pool_patches(x, 2, False)[0, :, 0].tolist() == [1, 5, 8]


@pytest.mark.parametrize("mlp", [True, False])
def test_a_sequence_keeps_some_experts(mlp):
    """The kept ones are those of the mean of real tokens, others do nothing, and the sequence's gate learns."""
    torch.manual_seed(0)
    shared = {"expert_selection_top_k": 2, "gate_mode": "ste"}
    layer = UnionOfMlpExperts(12, 24, 4, 1, **shared) if mlp else experts_of_heads(**shared)
    x, real = torch.randn(3, 7, 12), torch.ones(3, 7, dtype=torch.bool)
    real[1, 4:] = False
    out, routing = layer(x, real)
    used = routing.selected.any(1)
    means = torch.stack([x[0].mean(0), x[1, :4].mean(0), x[2].mean(0)])
    best = layer.sequence.gate(means).topk(2).indices
    allowed = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, best, True)
    assert not bool((used & ~allowed).any()) and bool((routing.selected.sum(-1) == real).all())
    assert torch.equal(routing.probabilities.sum(1) == 0, ~allowed)
    alone, _ = layer(x[1:2, :4])
    assert torch.allclose(out[1, :4], alone[0], atol=1e-6)
    out.square().sum().backward()
    assert float(layer.sequence.gate.weight.grad.abs().max()) > 0
    everything = UnionOfMlpExperts(12, 24, 4, 1, expert_selection_top_k=4)
    torch.manual_seed(1)
    assert everything(x)[1].selected.sum() == 21


def experts_of_heads(**options):
    return SelectiveMultiHeadAttention(12, 4, 4, 1, causal=False, **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"attn_top_k": 3}, "uoe_attn_top_k must be 1 to 2"),
        ({"attn_top_k": 0}, "uoe_attn_top_k"),
        ({"mlp_experts": 5, "mlp_top_k": 2}, "must divide intermediate_size"),
        ({"attn_experts": 3, "attn_top_k": 1}, "must divide the 2 KV heads"),
        ({"attn_experts": 4, "attn_top_k": 1}, "kv_shared=True lets experts share"),
        ({"attn_experts": 3, "attn_top_k": 1, "kv_shared": True}, "multiple of the 2 KV heads"),
        ({"attn_top_k": 1, "kv_shared": "yes"}, "must be True or False, got 'yes'"),
        ({"attn_top_k": 1, "patch_size": 0}, "uoe_patch_size"),
        ({"attn_top_k": 1, "gate_mode": "soft"}, "uoe_gate_mode"),
        ({"attn_top_k": 1, "layers": [9]}, "layer 9"),
        ({"attn_topk": 1}, "did you mean 'attn_top_k'"),
        ({}, "nothing is cut"),
        ({"attn_top_k": 1, "calibration": "text"}, "token ids"),
    ],
)
def test_bad_options_are_named(options, word):
    base = host("llama")
    with pytest.raises(ValueError, match=word):
        hf_attn.convert(base, "uoe", **options)
    assert type(base).__name__ == "LlamaForCausalLM"


def test_layers_with_a_window_and_looking_ahead_are_refused():
    with pytest.raises(ValueError, match="sliding_window"):
        hf_attn.convert(host("mistral", sliding_window=8), "uoe", attn_top_k=1)
    with pytest.raises(ValueError, match="causal=False"):
        SelectiveMultiHeadAttention(16, 2, 8, 1, selection="expert_choice")
    with pytest.raises(ValueError, match="expert_selection_top_k looks at later tokens"):
        SelectiveMultiHeadAttention(16, 2, 8, 1, expert_selection_top_k=1)
    with pytest.raises(ValueError, match="fewer experts than its top_k=2"):
        UnionOfMlpExperts(16, 32, 4, 2, expert_selection_top_k=1)
    with pytest.raises(ValueError, match="at most num_experts=4"):
        UnionOfMlpExperts(16, 32, 4, 2, expert_selection_top_k=5)
    assert spread(UoeLlamaForCausalLM(UoeLlamaConfig(**_tiny(), uoe_attn_top_k=1))).config.attention_experts() == 2


def _tiny():
    return {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
