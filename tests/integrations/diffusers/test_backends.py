"""Backend names of diffusers: on request only, safe for strangers, taken back without a trace."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.modeling_utils import ModelMixin

import hf_attn
from hf_attn.integrations.diffusers import register_backends, unregister_backends
from tests.integrations.diffusers.band import SMALL
from tests.integrations.diffusers.tiny import build, close

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def names():
    yield register_backends()
    unregister_backends()


def test_nothing_is_registered_without_a_request():
    code = (
        "import hf_attn, diffusers.models.attention_dispatch as d; from diffusers import FluxTransformer2DModel as F; "
        "import hf_attn.integrations.diffusers.model; "
        "print([n for n in d.AttentionBackendName.__members__ if 'hf' in n.lower() and 'attn' in n.lower()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_members_are_real(names):
    assert "hf_attn_band" in names
    member = AttentionBackendName("hf_attn_band")
    assert member is AttentionBackendName["HF_ATTN_BAND"] is AttentionBackendName.HF_ATTN_BAND
    assert member in AttentionBackendName and member in list(AttentionBackendName)
    assert member in _AttentionBackendRegistry.list_backends()
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert register_backends() == names


def test_unregistering_leaves_nothing():
    before, size = list(AttentionBackendName.__members__), len(AttentionBackendName)
    setter = ModelMixin.set_attention_backend
    register_backends()
    assert len(AttentionBackendName) > size
    unregister_backends()
    assert list(AttentionBackendName.__members__) == before and len(AttentionBackendName) == size
    assert ModelMixin.set_attention_backend is setter
    with pytest.raises(ValueError, match="not a valid AttentionBackendName"):
        AttentionBackendName("hf_attn_band")


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setitem(AttentionBackendName._value2member_map_, "hf_attn_band", AttentionBackendName.NATIVE)
    with pytest.raises(ValueError, match="already has an attention backend 'hf_attn_band' that hf_attn did not add"):
        register_backends()


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_the_setter_of_diffusers_puts_a_mechanism_in(names, name):
    tiny = build(name)
    tiny.model.set_attention_backend("hf_attn_band")
    assert hf_attn.stats(tiny.model)["mechanism"] == "band"
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE
    tiny.run()
    assert hf_attn.stats(tiny.model)["totals"]["calls"] == tiny.calls
    tiny.model.set_attention_backend("hf_attn_band")
    assert hf_attn.stats(tiny.model)["totals"]["calls"] == 0
    tiny.model.reset_attention_backend()
    assert hf_attn.stats(tiny.model)["mechanism"] is None
    hf_attn.apply(tiny.model, "band")
    tiny.model.reset_attention_backend()
    assert hf_attn.stats(tiny.model)["mechanism"] == "band"  # it did not come with a backend name


def test_a_model_without_our_sites_runs_native_attention(names):
    tiny = build("flux")
    stock = tiny.run()
    with attention_backend("hf_attn_band"):
        assert torch.equal(tiny.run(), stock)


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_other_backends_set_afterwards_serve_the_dense_calls_and_do_not_remove_us(name):
    tiny = build(name)
    stock = tiny.run()
    hf_attn.apply(tiny.target, "band", density=1.0, **{**SMALL, "dense_steps": 1})
    try:
        tiny.model.set_attention_backend("_native_math")
        assert close(tiny.run(), stock)
        tiny.model.reset_attention_backend()
        assert close(tiny.run(), stock)
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    totals = hf_attn.stats(tiny.target)["totals"]
    assert (totals["dense_calls"], totals["sparse_calls"]) == (tiny.calls, tiny.calls)
    hf_attn.remove(tiny.target)
    if name == "flux":
        assert tiny.model.transformer_blocks[0].attn.processor._attention_backend is None
