"""Private parts of transformers that this integration relies on; a failure here names what upstream changed."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import masking_utils as host
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from hf_attn.integrations.transformers import masks
from hf_attn.integrations.transformers.attention import REFUSED
from tests.integrations.transformers.tiny import build, tokens

PACKED = torch.zeros(1, 4, dtype=torch.long)


def test_mask_function_names():
    """masks.index_mask knows patterns by these names; renamed ones would all run dense."""
    assert host.causal_mask_function.__name__ == masks._CAUSAL
    assert host.bidirectional_mask_function.__name__ == masks._BIDIRECTIONAL
    both = host.and_masks(host.causal_mask_function)
    assert both.__name__ == masks._AND and both.__qualname__ == "and_masks.<locals>." + masks._AND
    assert masks._known(host.sliding_window_causal_mask_function(3), 3)
    assert masks._known(host.sliding_window_bidirectional_mask_function(3), 3)
    assert masks._known(host.and_masks(host.causal_mask_function, host.packed_sequence_mask_function(PACKED)), None)
    assert host.or_masks(host.causal_mask_function).__name__ not in (masks._CAUSAL, masks._BIDIRECTIONAL, masks._AND)
    assert not masks._known(host.or_masks(host.causal_mask_function), None)


@pytest.mark.skipif(not hasattr(host, "remap_positions_for_packed_sequence"), reason="came after 5.17")
def test_remapped_positions_are_read():
    inner = host.remap_positions_for_packed_sequence(host.causal_mask_function, PACKED)
    assert masks._known(host.and_masks(inner, host.packed_sequence_mask_function(PACKED)), None)


def test_windows_are_inclusive_as_assumed():
    """Causal: distance < window. Bidirectional: distance <= window."""
    q, k = torch.tensor([5]), torch.arange(11)
    zero = torch.zeros(1, dtype=torch.long)
    assert host.sliding_window_causal_mask_function(2)(zero, zero, q, k).nonzero().flatten().tolist() == [4, 5]
    seen = host.sliding_window_bidirectional_mask_function(2)(zero, zero, q, k).nonzero().flatten().tolist()
    assert seen == [3, 4, 5, 6, 7]


def test_mask_function_arguments():
    """index_mask is called with the arguments sdpa_mask has, plus config and dtype."""
    ours = set(inspect.signature(masks.index_mask).parameters)
    theirs = set(inspect.signature(host.sdpa_mask).parameters) - {"kwargs", "allow_torch_fix"}
    assert theirs <= ours and "config" in ours


def test_interfaces():
    """Masks are looked up in `_global_mapping`, and `register` writes it."""
    for interface in (AttentionInterface, host.AttentionMaskInterface):
        assert "hf_attn_moba" in interface._global_mapping and callable(interface.register)
    assert "_global_mapping" in inspect.getsource(host._preprocess_mask_arguments)


def test_config_parts():
    config = PreTrainedConfig()
    assert config._attn_implementation is None and config._attn_implementation_internal is None
    assert config.sub_configs == {}
    assert "attn_implementation" in inspect.getsource(PreTrainedConfig)


def test_model_parts():
    assert PreTrainedModel._can_set_attn_implementation.__self__ is PreTrainedModel
    model = build("llama")
    assert model.get_correct_attn_implementation(None) == "sdpa"
    assert {"index", "attn_implementation"} & set(inspect.signature(model.set_attn_implementation).parameters)


# Arguments that modeling files pass to the attention function and that change nothing for us.
HARMLESS = {
    "attention_mask",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "dropout",
    "is_causal",
    "key",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "position_ids",
    "query",
    "scaling",
    "sliding_window",
    "value",
}


def calls_of(name: str, source: str):
    """The text of every call `name(...)` in a source file (parsing whole files would take seconds)."""
    for match in re.finditer(rf"\b{name}\(", source):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        yield source[match.start() : end]


def test_every_argument_of_the_attention_function_is_classified():
    """A new named argument upstream must be put into HARMLESS or refused before it can be ignored silently."""
    found: dict[str, str] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for text in calls_of("attention_interface", path.read_text()):
            call = ast.parse(text, mode="eval").body
            found.update({keyword.arg: path.name for keyword in call.keywords if keyword.arg})
    assert len(found) > 5
    unknown = {name: file for name, file in found.items() if name not in HARMLESS | REFUSED.keys()}
    assert not unknown


RECEIVED = {
    "llama": {"position_ids"},
    "qwen3": {"sliding_window"},
    "mistral": {"sliding_window"},
    "gemma3_text": {"sliding_window"},
    "gpt2": set(),
    "opt": set(),
}


@pytest.mark.parametrize("model_type", list(RECEIVED))
def test_call_contract(model_type):
    """Layouts and keywords of a real call: q [B, H, Q, D], k/v [B, Hkv, KV, D], output [B, Q, H, D]."""
    calls = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, query, key, value, kwargs))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("hf_attn_probe", probe)
    try:
        model = build(model_type, "hf_attn_probe")
        model(tokens(2, 5))
    finally:
        del AttentionInterface._global_mapping["hf_attn_probe"]
    assert len(calls) == 2
    module, query, key, value, kwargs = calls[0]
    kv_heads = 4 if model_type in ("gpt2", "opt") else 2
    assert query.shape == (2, 4, 5, 8) and key.shape == value.shape == (2, kv_heads, 5, 8)
    assert getattr(module, "is_causal", True) and module.layer_idx == 0 and module.config is model.config
    assert {"dropout", "scaling"} | RECEIVED[model_type] <= set(kwargs)
