"""Parity adapter of Lightning Attention and TNL: every result of a golden file, through the public API."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

import hf_attn  # noqa: F401  registers the model type
from hf_attn import ops
from hf_attn.models.tnl import TnlConfig, TnlForCausalLM
from hf_attn.nn.decay import base_slopes

HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Cases of the op by prefix, base slopes for the usual head counts, and one small model."""
    results = {f"slopes.h{heads}": base_slopes(heads) for heads in range(1, 129)}
    for name, case in config.items():
        if isinstance(case, dict) and f"{name}.q" in inputs:
            results.update({f"{name}.{key}": value for key, value in _op(inputs, name, case).items()})
        elif isinstance(case, dict) and f"{name}.input_ids" in inputs:
            eps = config.get("norm_eps", 1e-6)
            results.update({f"{name}.{key}": value for key, value in _model(inputs, name, case, eps).items()})
    return results


def _op(inputs: dict[str, Tensor], name: str, case: dict[str, Any]) -> dict[str, Tensor]:
    given = {
        key: inputs[f"{name}.{key}"] for key in ("q", "k", "v", "slopes", "initial_state", "grad_out", "grad_state")
    }
    results = {}
    for suffix, start in (("", None), ("_init", given["initial_state"])):
        leaves = [given[key].clone().requires_grad_() for key in "qkv"]
        start = None if start is None else start.clone().requires_grad_()
        out, state = ops.linear_attention(
            *leaves, given["slopes"], initial_state=start, return_state=True, block_size=case["blk"]
        )
        loss = (out * given["grad_out"]).sum()
        if start is not None:
            loss = loss + (state * given["grad_state"]).sum()
        loss.backward()
        results |= {f"out{suffix}": out, f"final_state{suffix}": state}
        results |= {f"d{key}{suffix}": leaf.grad for key, leaf in zip("qkv", leaves, strict=True)}
        if start is not None:
            results["dinitial_state"] = start.grad
    return results


def _model(inputs: dict[str, Tensor], name: str, case: dict[str, Any], eps: float) -> dict[str, Tensor]:
    config = TnlConfig(
        vocab_size=case["V"],
        hidden_size=case["D"],
        num_hidden_layers=case["L"],
        num_attention_heads=case["H"],
        intermediate_size=case["G"],
        lrpe_layers=[index for index, on in enumerate(case["lrpe"]) if on],
        scale_embedding=not case["noscale"],
        norm_eps=eps,
        tie_word_embeddings=False,
    )
    model = TnlForCausalLM(config).eval()
    prefix = f"{name}.w."
    weights = {_parameter(key[len(prefix) :]): value for key, value in inputs.items() if key.startswith(prefix)}
    model.load_state_dict(weights)
    ids, first = inputs[f"{name}.input_ids"].long(), case["Tlen"]
    with torch.no_grad():
        output = model(ids[:, :first], use_cache=True)
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        states = {f"state.{i}": layer.state.get("state") for i, layer in enumerate(cache.layers)}
        logits = [output.logits]
        for step in range(first, ids.shape[1]):
            logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
        padded = model(inputs[f"{name}.padded_ids"].long(), attention_mask=inputs[f"{name}.padded_mask"].long()).logits
    return {"logits": torch.cat(logits, 1), "padded_logits": padded, **states}


def _parameter(name: str) -> str:
    """Name in the golden file -> name in a published checkpoint."""
    for pattern, replacement in (
        (r"^embed\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^layers\.", "model.layers."),
        (r"\.attn\.qkvu\.", ".token_mixer.qkvu_proj."),
        (r"\.attn\.out\.", ".token_mixer.out_proj."),
        (r"\.attn\.theta$", ".token_mixer.lrpe.theta"),
        (r"\.mlp\.a\.", ".channel_mixer.l1."),
        (r"\.mlp\.b\.", ".channel_mixer.l2."),
        (r"\.mlp\.c\.", ".channel_mixer.l3."),
    ):
        name = re.sub(pattern, replacement, name)
    return name
