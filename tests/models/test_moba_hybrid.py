"""MobaHybridForCausalLM: the stack of the paper, its sizes, and what each kind of layer does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attn
from hf_attn.models.moba_hybrid import MobaHybridConfig
from tests.integrations.transformers.tiny import tokens
from tests.models.families import family


@pytest.mark.parametrize(("name", "embedded", "others"), [("340m", 33, 308), ("1b", 66, 1611)])
def test_presets_have_the_published_sizes(name, embedded, others):
    """Millions of parameters, embeddings and the rest (specification, section 6)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MobaHybridConfig.preset(name, kconv_width=3))
    assert type(model).__name__ == "MobaHybridForCausalLM" and model.config._attn_implementation == "hf_attn_moba"
    embedding = model.model.embed_tokens.weight.numel()
    convolutions = sum(w.numel() for n, w in model.named_parameters() if "k_conv1d" in n)
    assert convolutions == 12 * 3 * model.config.hidden_size
    assert round(embedding / 1e6) == embedded
    assert round((model.num_parameters() - embedding - convolutions) / 1e6) == others
    assert model.config.head_dim == 64 and not any("proj.bias" in n for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match="presets: 340m, 1b"):
        MobaHybridConfig.preset("2b")


def test_layers_alternate_beginning_with_a_window():
    config = MobaHybridConfig(num_hidden_layers=5, kconv_width=3)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert config.kconv_layers == [1, 3] and config.sliding_window == 256
    again = AutoConfig.for_model(**{**config.to_dict(), "model_type": "moba_hybrid"})
    assert again.to_dict() == config.to_dict()


@torch.no_grad()
def test_global_layers_have_no_positions():
    """To one such layer two earlier tokens are a set; positions, or a key convolution, tell their order."""
    ids = tokens(1, 12)
    swapped = ids.clone()
    swapped[0, [2, 5]] = ids[0, [5, 2]]
    one = {"moba": False, "num_hidden_layers": 1}
    blind = family("moba_hybrid", layer_types=["full_attention"], kconv_width=0, **one)
    torch.testing.assert_close(blind(ids).logits[:, -1], blind(swapped).logits[:, -1], rtol=1e-4, atol=1e-4)
    for other in (
        family("moba_hybrid", layer_types=["full_attention"], global_positions=True, kconv_width=0, **one),
        family("moba_hybrid", sliding_window=12, kconv_width=0, **one),
        family("moba_hybrid", layer_types=["full_attention"], **one),
    ):
        assert (other(ids).logits - other(swapped).logits)[:, -1].abs().max() > 1e-3


@torch.no_grad()
def test_a_window_sees_its_tokens_and_no_more():
    model = family("moba_hybrid", moba=False, layer_types=["sliding_attention"], num_hidden_layers=1, kconv_width=0)
    ids = tokens(1, 12)
    base = model(ids).logits[0, -1]
    for position in range(12):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 7) % 90 + 3
        differs = (model(changed).logits[0, -1] - base).abs().max() > 1e-6
        assert differs == (position >= 12 - 6), position


@torch.no_grad()
def test_save_and_load_with_moba(tmp_path):
    model = family("moba_hybrid")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 23)
    assert type(loaded) is type(model) and loaded.config.hf_attn == model.config.hf_attn
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (tmp_path / "modeling_hf_attn.py").read_text().count("class MobaHybrid") == 3
    dense = hf_attn.remove(loaded)(ids).logits
    assert (dense - model(ids).logits).abs().max() > 1e-3


def test_bad_fields():
    with pytest.raises(ValueError, match="kconv_width must be odd, got 4"):
        family("moba_hybrid", kconv_width=4)
    with pytest.raises(ValueError, match="kconv_layers names layer 9"):
        family("moba_hybrid", kconv_layers=[9])
    with pytest.raises(ValueError, match="init must be one of"):
        family("moba_hybrid", kconv_init="ones")
