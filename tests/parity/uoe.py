"""Parity adapter of UoE: every result of a golden file, through the public layers and a converted Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_attn  # noqa: F401  registers the model types
from hf_attn.models.uoe import UoeLlamaConfig, UoeLlamaForCausalLM
from hf_attn.nn.experts import SelectiveMultiHeadAttention, UnionOfMlpExperts

HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Cases by prefix; which kind a case is shows in its tensors."""
    results = {}
    for name, case in config.items():
        given = {key.partition(".")[2]: value for key, value in inputs.items() if key.startswith(f"{name}.")}
        if not isinstance(case, dict) or not given:
            continue
        form = _llama if "w_gate_attn" in given else _attention if "w_q" in given else _mlp
        results.update({f"{name}.{key}": value for key, value in form(given, case).items()})
    return results


def _mlp(given: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    count, width, part = given["w_up"].shape
    swiglu = "w_act" in given
    if swiglu:
        top_k = case["topk"]
        options = {"gate_mode": "sum", "score_eps": case["epsilon"], "score_scale": case["capacity"]}
    else:
        top_k = case["topk_mask"]
        options = {"selection": "expert_choice", "capacity": 0.5, "score_norm": "batch", "score_eps": 1e-8}
    layer = UnionOfMlpExperts(width, count * part, count, top_k, activation="swiglu" if swiglu else "gelu", **options)
    _fill(layer, given)
    x = given["x"].clone().requires_grad_()
    out, routing = layer(x)
    results = {"y": out, "selected": routing.selected}
    if "cot" in given:
        (out * given["cot"]).sum().backward()
        results |= {"grad_x": x.grad, "grad_w_gate": layer.gate.weight.grad}
    return results


def _attention(given: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    count, width, dim = given["w_q"].shape
    layer = SelectiveMultiHeadAttention(
        width,
        count,
        dim,
        case["topk"],
        causal=case.get("causal", True),
        rope_theta=case["rope_theta"],
        positions=case["positions"],
    )
    _fill(layer, given)
    out, routing = layer(given["x"])
    return {"y": out, "selected": routing.selected}


def _fill(layer: torch.nn.Module, given: dict[str, Tensor]) -> None:
    weights = {key: value for key, value in given.items() if key.startswith(("w_", "b_")) and "gate" not in key}
    layer.load_state_dict({**weights, "gate.weight": given["w_gate"], "gate.bias": given["b_gate"]})


def _llama(given: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    heads, dim = case["num_kv_heads"], case["head_dim"]
    config = UoeLlamaConfig(
        vocab_size=8,
        hidden_size=given["x"].shape[2],
        intermediate_size=given["w_up"].shape[0],
        num_hidden_layers=1,
        num_attention_heads=heads * case["q_per_kv"],
        num_key_value_heads=heads,
        head_dim=dim,
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
        uoe_attn_top_k=case["topk_attn"],
        uoe_mlp_experts=case["n_experts_mlp"],
        uoe_mlp_top_k=case["topk_mlp"],
        uoe_gate_bias=False,
        uoe_always_select_first=0,
    )
    model = UoeLlamaForCausalLM(config).train()
    layer = model.model.layers[0]
    with torch.no_grad():
        for module, name in (
            (layer.self_attn.q_proj, "w_q"),
            (layer.self_attn.k_proj, "w_k"),
            (layer.self_attn.v_proj, "w_v"),
            (layer.self_attn.o_proj, "w_o"),
            (layer.self_attn.uoe_gate, "w_gate_attn"),
            (layer.mlp.gate_proj, "w_act"),
            (layer.mlp.up_proj, "w_up"),
            (layer.mlp.down_proj, "w_down"),
            (layer.mlp.uoe_gate, "w_gate_mlp"),
        ):
            module.weight.copy_(given[name])
    results = {}
    positions = torch.arange(given["x"].shape[1])[None]
    for part, block in (("attn", layer.self_attn), ("mlp", layer.mlp)):
        x = given["x"].clone().requires_grad_()
        if part == "attn":
            out = block(x, position_embeddings=model.model.rotary_emb(x, positions))[0]
        else:
            out = block(x)
        (out * given["cot"]).sum().backward()
        results |= {
            f"y_{part}": out,
            f"sel_{part}": block.routing.selected,
            f"grad_x_{part}": x.grad,
            f"grad_gate_{part}": block.uoe_gate.weight.grad,
        }
    return results
