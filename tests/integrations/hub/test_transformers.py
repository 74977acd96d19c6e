"""A transformers model on the kernel's attention gives what it gives on SDPA: padding, packing, caches, training."""

from __future__ import annotations

import pytest
import torch

from hf_attn.integrations.hub.kernels import build_kernel, kernel_folders, kernel_sources
from hf_attn.ops import path_counts
from hf_attn.ops.hfattn_sparse import flash_attn_forward

NAME = "kernel_under_test"


@pytest.fixture
def registered():
    """The kernel under a name, as transformers registers a Hub kernel: its function, and the masks of SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, flash_attn_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    yield NAME
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def outcomes(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = {}
    with torch.no_grad():
        found["padded"] = model(ids, attention_mask=mask).logits[mask.bool()]
        found["right padded"] = model(ids, attention_mask=mask.flip(1)).logits[mask.flip(1).bool()]
        restarting = torch.cat([torch.arange(60), torch.arange(90)])[None]
        found["packed"] = model(ids[1:], position_ids=restarting, use_cache=False).logits
        found["tokens"] = model.generate(ids, **options)
        found["tokens, static cache"] = model.generate(
            ids, **options, cache_implementation="static", disable_compile=True
        )
    loss = model(ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    found["loss"], found["gradient"] = loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    return found


def compare(model, implementation: str) -> None:
    model.set_attn_implementation("sdpa")
    expected = outcomes(model)
    model.set_attn_implementation(implementation)
    for name, got in outcomes(model).items():
        torch.testing.assert_close(got, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_on_the_kernel_is_the_model_on_sdpa(tiny_model, registered):
    from transformers import AutoModelForCausalLM

    compare(AutoModelForCausalLM.from_pretrained(tiny_model), registered)
    counts = path_counts()
    assert counts["block_sparse_attention | torch"] > 0 and counts["block_sparse_attention_backward | torch"] == 2


def test_the_name_of_the_repository_is_an_attn_implementation(tiny_model, tmp_path, monkeypatch):
    """Needs a transformers that accepts the installed `kernels`: 5.20 to 5.22 take 0.17, 5.23 and 5.24 refuse it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this transformers does not accept the installed version of kernels, or there is none")
    build_kernel(kernel_folders(kernel_sources())["hfattn-sparse"], tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"hf-attn/hfattn-sparse={tmp_path}")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="hf-attn/hfattn-sparse")
    compare(model, "hf-attn/hfattn-sparse")
