"""TNL: sizes, caches, padding, packing, round trips and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attn  # noqa: F401  registers the model type
from hf_attn.integrations.transformers.cache import cache_argument
from hf_attn.integrations.transformers.recurrent import RecurrentCache
from hf_attn.models.conversion import enable_checkpointing
from hf_attn.models.tnl import TnlConfig, TnlForCausalLM
from hf_attn.nn.decay import layer_slopes

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "block_size": 4,
}
# Another gate, values through silu and a LayerNorm: the options of TNL3.
THIRD = {"gate_type": "low_rank_sigmoid", "gate_dim": 4, "v_act": "silu", "attn_norm": "layernorm"}


def tiny(**options) -> TnlForCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TnlConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "theta" not in name:
                weight.normal_(0, 0.25)
    return model.eval()


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "billions"), [("385m", 0.399), ("1b", 1.02), ("2-1b", 1.02), ("2-3b", 2.91), ("7b", 6.84), ("15b", 14.83)]
)
def test_presets_have_the_published_sizes(name, billions):
    with torch.device("meta"):
        model = TnlForCausalLM(TnlConfig.preset(name))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_published_config_is_read():
    fields = {
        "model_type": "transnormer",
        "vocab_size": 64000,
        "decoder_embed_dim": 2048,
        "decoder_layers": 16,
        "decoder_attention_heads": 16,
        "hidden_dim": 2048,
        "glu_dim": 5632,
        "no_scale_embedding": True,
        "norm_type": "simplermsnorm",
        "linear_act_fun": "swish",
        "linear_use_lrpe_list": [1] + [0] * 15,
        "bias": False,
    }
    assert TnlConfig.from_published(fields).to_dict() == TnlConfig.preset("2-1b").to_dict()
    with pytest.raises(ValueError, match="bias"):
        TnlConfig.from_published({**fields, "bias": True})


def test_parameters_have_the_published_names():
    names = {name for name, _ in tiny().named_parameters()}
    mixer = {f"token_mixer.{p}.weight" for p in ("qkvu_proj", "out_proj")}
    channel = {f"channel_mixer.{p}.weight" for p in ("l1", "l2", "l3")}
    layers = {f"model.layers.{i}.{name}" for i in range(3) for name in mixer | channel}
    assert names == layers | {"model.embed_tokens.weight", "model.layers.0.token_mixer.lrpe.theta"}


@pytest.mark.parametrize("options", [{}, THIRD, {"lrpe_layers": [0, 1, 2]}], ids=["tnl", "tnl3", "lrpe"])
@torch.no_grad()
def test_generation_with_and_without_a_cache(options):
    """Greedy and beams, rows of unequal length."""
    model = tiny(**options)
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4], tokens[0, :4] = 0, 0
    for search in ({}, {"num_beams": 3}):
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **search}
        with_cache = model.generate(tokens, use_cache=True, **arguments)
        assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **arguments))


@torch.no_grad()
def test_padding_on_any_side_and_in_chunks():
    model = tiny()
    rows = [ids(1, 11), ids(1, 7, seed=2), ids(1, 3, seed=3)]
    alone = [model(row).logits[0] for row in rows]
    for side in ("left", "right"):
        tokens, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(11 - row.shape[1], 11) if side == "left" else slice(0, row.shape[1])
            tokens[index, place], mask[index, place] = row[0], 1
        whole = model(tokens, attention_mask=mask).logits
        cache, parts = RecurrentCache(3), []
        for start, stop in ((0, 5), (5, 6), (6, 11)):
            parts.append(model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        for index, logits in enumerate(alone):
            real = mask[index].bool()
            torch.testing.assert_close(whole[index, real], logits, rtol=0, atol=2e-5)
            torch.testing.assert_close(torch.cat(parts, 1)[index, real], logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_packed_rows_are_separate_sequences():
    model = tiny(lrpe_layers=[0, 2])
    first, second = ids(1, 6), ids(1, 5, seed=2)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = torch.cat([first, second], 1)
    expected = torch.cat([model(first).logits, model(second).logits], 1)
    for told in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 6, 11], dtype=torch.int32)}):
        torch.testing.assert_close(model(packed, use_cache=False, **told).logits, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(packed, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_a_conversation_goes_on_and_states_can_be_saved(tmp_path):
    model = tiny()
    tokens = ids(1, 12)
    cache = RecurrentCache(3)
    model(tokens[:, :7], past_key_values=cache)
    cache.save(tmp_path / "states.safetensors")
    rest = model(tokens[:, 7:], past_key_values=cache).logits
    loaded = RecurrentCache(3).load(tmp_path / "states.safetensors")
    assert loaded.get_seq_length() == 7
    assert torch.equal(model(tokens[:, 7:], past_key_values=loaded).logits, rest)
    torch.testing.assert_close(rest, model(tokens).logits[:, 7:], rtol=0, atol=2e-5)
    longer = model.generate(tokens, **{cache_argument(model): RecurrentCache(3)}, max_new_tokens=3, do_sample=False)
    assert torch.equal(longer, model.generate(tokens, max_new_tokens=3, do_sample=False))
    with pytest.raises(ValueError, match="this cache has 2"):
        RecurrentCache(2).load(tmp_path / "states.safetensors")


def test_state_size_and_precision_do_not_depend_on_the_length():
    model = tiny().bfloat16()
    cache = RecurrentCache(3)
    sizes = set()
    with torch.no_grad():
        for _ in range(3):
            model(ids(1, 20), past_key_values=cache)
            sizes.add(sum(layer.state.bytes() for layer in cache.layers))
    assert len(sizes) == 1 and cache.layers[1].state.get("state").dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_weight(checkpointing):
    model = tiny().train()
    if checkpointing:
        enable_checkpointing(model)
    batch = ids(2, 10)
    loss = model(batch, labels=batch).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_round_trip_keeps_tied_weights(tmp_path):
    model = tiny(**THIRD)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_hf_attn.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is TnlForCausalLM and AutoConfig.from_pretrained(tmp_path).gate_dim == 4
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tokens = ids(1, 8)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_slopes_of_the_three_rules():
    assert layer_slopes(4, 0, 1).tolist() == pytest.approx([s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)])
    assert layer_slopes(4, 3, 8)[0] == pytest.approx(0.25 * (4 / 7 + 1e-5))
    assert layer_slopes(6, 7, 8, "minimax")[0] == pytest.approx(2 ** (-8 / 6) * (1 - 7 / (7 + 1e-5) + 1e-5), rel=1e-3)
    assert layer_slopes(8, 2, 4, "paper").tolist() == pytest.approx([h * 0.5 for h in range(8)])
    with pytest.raises(ValueError, match="did you mean 'minimax'"):
        layer_slopes(4, 0, 2, "minmax")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"slope_style": "alibi"}, "slope_style"),
        ({"lrpe_layers": [3]}, "lrpe_layers"),
        ({"gate_type": "none"}, "gate_type"),
    ],
)
def test_bad_configs_are_named(fields, word):
    with pytest.raises(Exception, match=word):
        TnlForCausalLM(TnlConfig(**{**SIZES, **fields}))


def test_misuse_of_the_cache_is_named():
    model, tokens = tiny(), ids(1, 6)
    cache = RecurrentCache(3)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match="another batch"):
            model(ids(2, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot forget"):
            cache.crop(-2)
        with pytest.raises(ValueError, match="RecurrentCache"):
            model(tokens, past_key_values=RecurrentCache(2))
        with pytest.raises(ValueError, match="float32 or float64"):
            cache.layers[0].state.put(1, state=torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="mask of pairs"):
            model(tokens, attention_mask=torch.ones(1, 1, 6, 6))
        with pytest.raises(ValueError, match=r"(?i)assisted|stateful"):
            model.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert cache.get_seq_length() == 6
