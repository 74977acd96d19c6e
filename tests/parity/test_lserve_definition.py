"""LServe's adapter on other sizes than the golden file's, against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn.ops.hfattn_sparse.paged import dequantize, quantize_per_token
from tests.parity import lserve

CASES = [
    {"num_heads": 6, "num_kv_heads": 3, "head_dim": 24, "physical_page": 12, "logical_page": 6, "token_budget": 60,
     "sink": 12, "local": 24, "reuse_interval": 3, "prefill_len": 150, "decode_steps": 15, "ctx_sink": 5,
     "ctx_local": 17, "prefill_case_len": 70, "kv_bits": 8},
    # The budget is passed on the way, and a page holds one logical page.
    {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "physical_page": 8, "logical_page": 8, "token_budget": 40,
     "sink": 0, "local": 8, "reuse_interval": 4, "prefill_len": 33, "decode_steps": 20, "ctx_sink": 0, "ctx_local": 1,
     "prefill_case_len": 1, "kv_bits": 4},
]  # fmt: skip


def inputs_of(config: dict) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    total = config["prefill_len"] + config["decode_steps"]
    heads, kv_heads, dim = (config[name] for name in ("num_heads", "num_kv_heads", "head_dim"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    length = config["prefill_case_len"]
    return {
        "k": draw(kv_heads, total, dim), "v": draw(kv_heads, total, dim),
        "dec_q": draw(config["decode_steps"], heads, dim),
        "retrieval_flags": torch.tensor([1, 0, 1, 1][:kv_heads]), "pre_q": draw(length, heads, dim),
        "gate_alpha": torch.rand(kv_heads, generator=generator), "gate_dout": draw(length, heads, dim),
        "cls_alpha": torch.rand(5, 3, generator=generator), "cls_sparsity": torch.tensor([0.0, 0.4, 1.0]),
    }  # fmt: skip


def decode(inputs: dict[str, Tensor], config: dict, quantised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, attended tokens and selecting steps, head by head."""
    past_k, past_v = inputs["k"], inputs["v"]
    if quantised:
        past_k, past_v = (dequantize(*quantize_per_token(x, config["kv_bits"])) for x in (past_k, past_v))
    page, logical, budget = config["physical_page"], config["logical_page"], config["token_budget"]
    group = config["num_heads"] // config["num_kv_heads"]
    outs, attends, ran, kept = [], [], [], None
    for step, queries in enumerate(inputs["dec_q"].double()):
        t = config["prefill_len"] + step
        token, length = torch.arange(t + 1), t + 1
        run = length > budget and (length % config["reuse_interval"] == 0 or kept is None)
        ran.append(int(run))
        if run:
            kept = {"last": (t - 1) // page}
            for head in range(config["num_heads"]):
                key = inputs["k"][head // group, :t].double()
                best = []
                for number in range(kept["last"]):
                    scores = []
                    for start in range(number * page, min(number * page + page, t), logical):
                        part = key[start : min(start + logical, (number + 1) * page, t)]
                        bounds = torch.maximum(queries[head] * part.amax(0), queries[head] * part.amin(0))
                        scores.append(float(bounds.sum()))
                    best.append(max(scores))
                order = sorted(range(len(best)), key=lambda n, b=best: (-b[n], -n))
                kept[head] = order[: max(3, budget // page) - 1]
        rows, masks = [], []
        for head in range(config["num_heads"]):
            if not inputs["retrieval_flags"][head // group]:
                mask = (token < config["sink"]) | (token > t - config["local"])
            elif length <= budget:
                mask = token >= 0
            else:
                pages = [*kept[head], *range(kept["last"], t // page + 1)]
                mask = torch.isin(token // page, torch.tensor(pages))
            key, value = (
                torch.cat([old[head // group, :t], new[head // group, t : t + 1]]).double()
                for old, new in ((past_k, inputs["k"]), (past_v, inputs["v"]))
            )
            weights = (key @ queries[head] * config["head_dim"] ** -0.5).masked_fill(~mask, -torch.inf).softmax(0)
            rows.append(weights @ value)
            full = torch.zeros(inputs["k"].shape[1], dtype=torch.uint8)
            full[: t + 1] = mask.to(torch.uint8)
            masks.append(full)
        outs.append(torch.stack(rows))
        attends.append(torch.stack(masks))
    return torch.stack(outs), torch.stack(attends), torch.tensor(ran)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("config", CASES, ids=["wide", "crossing"])
def test_adapter_follows_the_formulas(config, backend, monkeypatch):
    monkeypatch.setenv("HF_ATTN_BACKEND", backend)
    inputs = inputs_of(config)
    got = lserve.run(inputs, config)
    out, attend, ran = decode(inputs, config, quantised=False)
    assert torch.equal(got["dec_attend"], attend) and torch.equal(got["dec_select_step"], ran) and ran.sum() >= 2
    torch.testing.assert_close(got["dec_out"].double(), out, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        got["dec_out_kvq"].double(), decode(inputs, config, quantised=True)[0], rtol=0, atol=2e-4
    )
    length, group = config["prefill_case_len"], config["num_heads"] // config["num_kv_heads"]
    token = torch.arange(length)
    causal = token <= token[:, None]
    near = causal & ((token < config["ctx_sink"]) | (token > token[:, None] - config["ctx_local"]))
    key, value = (inputs[name][:, :length].double().repeat_interleave(group, 0) for name in "kv")
    scores = inputs["pre_q"].double().transpose(0, 1) @ key.mT * config["head_dim"] ** -0.5
    parts = [scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in (causal, near)]
    flags = inputs["retrieval_flags"].repeat_interleave(group)[:, None, None].bool()
    expected = torch.where(flags, *parts).transpose(0, 1)
    torch.testing.assert_close(got["pre_out"].double(), expected, rtol=0, atol=2e-5)
    alpha = inputs["gate_alpha"].double().repeat_interleave(group)[:, None, None]
    gated = (alpha * parts[0] + (1 - alpha) * parts[1]).transpose(0, 1)
    torch.testing.assert_close(got["gate_out"].double(), gated, rtol=0, atol=2e-5)
    slopes = ((parts[0] - parts[1]).transpose(0, 1) * inputs["gate_dout"]).sum((0, 2)).view(-1, group).sum(1)
    torch.testing.assert_close(got["gate_dalpha"].double(), slopes, rtol=0, atol=1e-3)
