"""The short decoding step with kept pages gives what the general step gives."""

from __future__ import annotations

import pytest
import torch

from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.mechanism import get_mechanism

SIZES = {
    "page_size": 8, "logical_page_size": 4, "token_budget": 32, "ctx_sink": 8, "ctx_local": 32, "dec_sink": 8,
    "dec_local": 16, "min_seq_len": 0, "heads": [[1, 0, 1]],
}  # fmt: skip


@pytest.mark.parametrize("group_select", ["per_query_head", "group_max"])
@pytest.mark.parametrize("kv_quant", [None, "int8", "int4", "int8-per-tensor"])
def test_kept_pages_give_the_general_step(kv_quant, group_select):
    lserve, outputs, kept = get_mechanism("lserve"), {}, False
    for keep in (True, False):
        generator = torch.Generator().manual_seed(0)
        options = {**SIZES, "kv_quant": kv_quant, "group_select": group_select, "keep_selected": keep}
        config = lserve.config.from_dict(options)
        store = lserve.store(config, 0, 3)
        key, value = (torch.randn(2, 3, 120, 8, generator=generator) for _ in range(2))
        query = torch.randn(2, 6, 120, 8, generator=generator)
        store.append(key[:, :, :90], value[:, :, :90], None)
        outputs[keep] = []
        for at in range(90, 120):
            new, tokens = slice(at, at + 1), TokenLayout.full(2, 1, at + 1)
            layer = LayerContext(index=0, cache=store)
            # Gradients ask for the general step, which the kept pages do not see.
            asked = query[:, :, new].clone().requires_grad_(at % 5 == 0)
            call = AttentionCall(asked, key[:, :, new], value[:, :, new], 8**-0.5, True, tokens, layer)
            if at % 7 == 0:
                # A step taken back leaves no trace.
                lserve(call, config)
                store.take_back(1)
            outputs[keep].append(lserve(call, config).detach())
        kept |= store.kept is not None
    assert kept
    torch.testing.assert_close(torch.cat(outputs[True]), torch.cat(outputs[False]), rtol=1e-5, atol=2e-6)
