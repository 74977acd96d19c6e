"""Parity adapter of PSA: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.grid import TokenGrid, hilbert_permutation

LEVELS = ("1", "2", "4", "8")


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case; `q`, `k`, `v` `[B, H, N, D]` lie row-major on `config["grid"]`."""
    order = hilbert_permutation(TokenGrid(*config["grid"]))
    scale = config["softmax_scale"]
    sizes = {"block_q": config["block_q"], "block_k": config["block_k"]}
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    query, key, value = (order.apply(leaf) for leaf in leaves)
    results = {"hilbert": order.forward}

    for estimator in ("softmax", "rowmax"):
        results[f"importance_{estimator}"] = ops.sampled_importance(
            query, key, inputs["sample_q"], inputs["sample_k"], scale=scale, estimator=estimator, **sizes
        )
    importance = results["importance_softmax"]
    thresholds = [config["thresholds"][level] for level in LEVELS]
    rule = {"mode": "threshold", "bounds": thresholds, "min_full": config["min_full_ratio"]}
    quantiles = [config["topk_bounds"][level] for level in LEVELS]
    cap = ops.similarity_cap(key, block_k=config["block_k"], thresholds=config["sim_thresholds"])
    cap = cap.repeat_interleave(query.shape[1] // key.shape[1], 1)
    results["sim_cap"] = cap
    results["mask_threshold"] = ops.assign_levels(importance, **rule)
    results["mask_threshold_aligned"] = ops.assign_levels(importance, align_divisor=config["align_divisor"], **rule)
    results["mask_topk"] = ops.assign_levels(importance, mode="quantile", bounds=quantiles)
    results["mask_capped"] = ops.assign_levels(importance, cap=cap, **rule)

    for name in ("threshold", "topk", "capped"):
        out = ops.pyramid_attention(query, key, value, results[f"mask_{name}"], scale=scale, **sizes)
        results[f"out_{name}"] = order.undo(out)
    grads = torch.autograd.grad((results["out_capped"] * inputs["grad_out"]).sum(), leaves)
    results.update({f"grad_{name}": grad for name, grad in zip("qkv", grads, strict=True)})
    results.update(_causal(inputs, config))
    return results


def _causal(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The prefill variant, in the original order; its block is that of the stored keys."""
    block = config["block_k"]
    upper = {str(level): high for level, _, high in config["causal_levels"]}
    scale, query, key, value = config["softmax_scale"], *(inputs[name] for name in "qkv")
    importance = ops.antidiagonal_importance(query, key, block=block, stride=config["antidiag_stride"], scale=scale)
    levels = ops.assign_levels(
        importance,
        mode="energybound",
        bounds=[upper[level] for level in LEVELS],
        causal=True,
        last_text_blocks=-(-config["causal_text_tokens"] // block),
    )
    out = ops.pyramid_attention(query, key, value, levels, block_q=block, block_k=block, causal=True, scale=scale)
    return {"importance_antidiag": importance, "mask_causal": levels, "out_causal": out}
