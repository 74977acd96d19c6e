"""Parity adapter of LServe: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import classify_heads, ops
from hf_attn.caches.lserve import LServeStore
from hf_attn.caches.quantization import KVFormat, absmax_scale
from hf_attn.call import AttentionCall, LayerContext, TokenLayout
from hf_attn.mechanism import get_mechanism
from hf_attn.ops.hfattn_sparse.paged import dequantize, quantize_per_tensor, quantize_per_token


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case: keys and values `[Hkv, N, D]`, queries `[steps, Hq, D]` and `[N, Hq, D]`."""
    options = {
        "page_size": config["physical_page"],
        "logical_page_size": config["logical_page"],
        "token_budget": config["token_budget"],
        "reuse_interval": config["reuse_interval"],
        "dec_sink": config["sink"],
        "dec_local": config["local"],
        "ctx_sink": config["ctx_sink"],
        "ctx_local": config["ctx_local"],
        "heads": [inputs["retrieval_flags"].tolist()],
        "min_seq_len": 0,
    }
    key, value = inputs["k"][None], inputs["v"][None]
    results = _quantisation(inputs, config["kv_bits"])
    results.update(_statistics(inputs["dec_q"], key, config))
    results.update(_decode(inputs["dec_q"], key, value, options, config))
    quantised = {**options, "kv_quant": f"int{config['kv_bits']}"}
    results["dec_out_kvq"] = _decode(inputs["dec_q"], key, value, quantised, config)["dec_out"]
    results.update(_prompt(inputs, key, value, options, config))
    results["cls_flags"] = torch.stack(
        [classify_heads(inputs["cls_alpha"], float(s)) for s in inputs["cls_sparsity"]]
    ).int()
    return results


def _quantisation(inputs: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    results = {}
    scales = []
    for name in "kv":
        x = inputs[name]
        codes, scale, zero = quantize_per_token(x, bits)
        results |= {f"{name}_code": codes, f"{name}_scale": scale, f"{name}_zero": zero}
        results[f"{name}_dequant"] = dequantize(codes, scale, zero)
        scales.append(absmax_scale(x))
        results[f"pt_{name}_code"] = quantize_per_tensor(x, scales[-1])
        stored = KVFormat(f"int{bits}").encode(x[None]).dense()[0, :, 0]
        assert torch.equal(stored, results[f"{name}_dequant"])
    return results | {"pt_scale": torch.stack(scales)}


def _statistics(queries: Tensor, key: Tensor, config: dict) -> dict[str, Tensor]:
    length = config["prefill_len"]
    sizes = {"page_size": config["physical_page"], "logical_page_size": config["logical_page"]}
    stats, count = ops.page_statistics(key[:, :, :length], **sizes)
    logical = ops.page_scores(queries[:1], stats, logical=True)[0]
    empty = count == 0
    clean = torch.where(empty[None, None, :, :, None, None], 0.0, stats)[0]
    return {
        "kmax": clean[..., 0, :],
        "kmin": clean[..., 1, :],
        "logical_count": count,
        "logical_scores": logical.masked_fill(empty, 0.0),
        "page_scores": ops.page_scores(queries[:1], stats)[0],
    }


def _decode(queries: Tensor, key: Tensor, value: Tensor, options: dict, config: dict) -> dict[str, Tensor]:
    """All decode steps behind a cache filled with the first tokens."""
    mechanism = get_mechanism("lserve")
    settings = mechanism.config.from_dict(options)
    store: LServeStore = mechanism.store(settings, 0, key.shape[1])
    past, steps, heads = config["prefill_len"], queries.shape[0], queries.shape[1]
    store.append(key[:, :, :past], value[:, :, :past], None)
    size, group = settings.page_size, heads // key.shape[1]
    pages = torch.zeros(steps, heads, -(-key.shape[2] // size), dtype=torch.uint8)
    attend = torch.zeros(steps, heads, key.shape[2], dtype=torch.uint8)
    selected, outs = [], []
    retrieval = [h for h in range(heads) if options["heads"][0][h // group]]
    token = torch.arange(key.shape[2])
    for step in range(steps):
        t, seen = past + step, {}
        layer = LayerContext(index=0, count=1, cache=store, record=lambda seen=seen, **kw: seen.update(kw))
        new = slice(t, t + 1)
        call = AttentionCall(
            queries[step][None, :, None], key[:, :, new], value[:, :, new], key.shape[3] ** -0.5, True,
            TokenLayout.full(1, 1, t + 1), layer,
        )  # fmt: skip
        outs.append(mechanism(call, settings)[0, :, 0])
        selected.append(seen["counts"]["selector_runs"])
        if store.selection is None:
            pages[step, retrieval, : t // size + 1] = 1
        else:
            chosen = store.selection.pages[0]
            for head, row in zip(retrieval, chosen.tolist(), strict=True):
                pages[step, head, row] = 1
                pages[step, head, store.selection.last[0] : t // size + 1] = 1
        attend[step] = pages[step].repeat_interleave(size, 1)[:, : key.shape[2]]
        window = (token < settings.dec_sink) | (token > t - settings.dec_local)
        attend[step, [h for h in range(heads) if h not in retrieval]] = window.to(torch.uint8)
        attend[step] *= (token <= t).to(torch.uint8)
        assert seen["computed"] == int(attend[step].sum())
    return {
        "dec_out": torch.stack(outs),
        "dec_select_step": torch.tensor(selected),
        "dec_pages": pages,
        "dec_attend": attend,
    }


def _prompt(inputs: dict[str, Tensor], key: Tensor, value: Tensor, options: dict, config: dict) -> dict[str, Tensor]:
    length = config["prefill_case_len"]
    query = inputs["pre_q"].transpose(0, 1)[None]
    key, value = key[:, :, :length], value[:, :, :length]
    mechanism = get_mechanism("lserve")
    tokens, layer = TokenLayout.full(1, length), LayerContext(index=0)
    call = AttentionCall(query, key, value, key.shape[3] ** -0.5, True, tokens, layer)
    out = mechanism(call, mechanism.config.from_dict(options))
    alpha = inputs["gate_alpha"].clone().requires_grad_()
    sizes = {"sinks": config["ctx_sink"], "window": config["ctx_local"]}
    gated = ops.gated_streaming_attention(query, key, value, alpha, **sizes)[0].transpose(0, 1)
    (gated * inputs["gate_dout"]).sum().backward()
    return {"pre_out": out[0].transpose(0, 1), "gate_out": gated, "gate_dalpha": alpha.grad}
