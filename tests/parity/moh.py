"""Parity adapter of MoH: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_attn.nn.head_router import LearnedRouter, QueryNormRouter, load_balance
from hf_attn.ops import head_routed_attention

AUX = 0.01


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of all cases; a case with `shared` (a number) is bidirectional with a learned router."""
    results: dict[str, Tensor] = {}
    for name, case in config.items():
        mine = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
        found = _learned(mine, case) if "shared" in case else _query_norm(mine, case)
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


def _learned(inputs: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    x = inputs["x"].clone().requires_grad_()
    router = LearnedRouter(x.shape[-1], case["num_heads"], list(range(case["shared"])), case["topk"])
    given = {"wg": "w_r", "wg_0": "w_h", "wg_1": "w_s"}
    router.load_state_dict({f"{ours}.weight": inputs[theirs] for ours, theirs in given.items() if theirs in inputs})
    routing = router(x)
    qkv = linear(x, inputs["w_qkv"], inputs["b_qkv"]).unflatten(-1, (3, case["num_heads"], -1)).permute(2, 0, 3, 1, 4)
    out = head_routed_attention(*qkv, routing.heads.transpose(1, 2), causal=False).transpose(1, 2)
    y = linear((out * routing.gates[..., None]).flatten(2), inputs["w_o"], inputs["b_o"])
    aux = load_balance(routing.prob, routing.chosen, form="code")
    ((y * inputs["cot"]).sum() + AUX * aux).backward()
    grads = {f"grad_{theirs}": getattr(router, ours).weight.grad for ours, theirs in given.items() if theirs in inputs}
    return {"y": y, "gates": routing.gates, "aux": aux[None], "grad_x": x.grad, **grads}


def _query_norm(inputs: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    if "cot" not in inputs:
        y, routing = _layer(inputs["x"], inputs["w_q"], inputs, case, "selected")
        return {"y": y, "head_mask": routing.heads}
    results: dict[str, Tensor] = {}
    for ste in ("selected", "all"):
        x, w_q = (inputs[name].clone().requires_grad_() for name in ("x", "w_q"))
        y, routing = _layer(x, w_q, inputs, case, ste)
        loss = load_balance(routing.prob, routing.chosen, form="paper")
        ((y * inputs["cot"]).sum() + AUX * loss).backward()
        results |= {f"grad_x_{ste}": x.grad, f"grad_w_q_{ste}": w_q.grad}
        if ste == "selected":
            results |= {"y": y, "head_mask": routing.heads, "router_prob": routing.prob, "lb": loss[None]}
    return results


def _layer(x: Tensor, w_q: Tensor, inputs: dict[str, Tensor], case: dict, ste: str):
    """Output of one attention layer and its routing."""
    dim = case["head_dim"]
    query, key, value = (linear(x, w).unflatten(-1, (-1, dim)) for w in (w_q, inputs["w_k"], inputs["w_v"]))
    routing = QueryNormRouter(case["num_heads"], case["shared_heads"], case["topk"], ste=ste)(query)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    rate = case["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.arange(x.shape[1])[:, None] * rate
    angle = torch.cat([angle, angle], -1)[None]
    query, key = apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
    out = head_routed_attention(query, key, value, routing.heads.transpose(1, 2)).transpose(1, 2)
    return linear((out * routing.gates[..., None]).flatten(2), inputs["w_o"]), routing
