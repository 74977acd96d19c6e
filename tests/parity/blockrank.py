"""Parity adapter of BlockRank: every result of a golden file, through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.call import TokenLayout
from hf_attn.mechanisms.blockrank import positions
from hf_attn.training.ranking import contrastive_loss

HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case; q, k, v `[B, H, M * L, D]`, valid `[B, M, L]`, signal_positions and answer_ids `[B, 2]`."""
    valid = inputs["valid"].bool()
    blocks = valid.shape[1]
    segments = torch.where(valid, torch.arange(blocks)[None, :, None], -1).flatten(1)
    layout = TokenLayout.documents(segments, blocks)
    query, key, value = (inputs[name].clone().requires_grad_() for name in "qkv")
    out = ops.document_attention(query, key, value, tokens=layout).transpose(1, 2)
    (out * inputs["cot"]).sum().backward()
    results = {"out": out, **{f"grad_{n}": t.grad for n, t in zip("qkv", (query, key, value), strict=True)}}

    query, key = (inputs[name].clone().requires_grad_() for name in "qk")
    rows, documents = inputs["signal_positions"], max(blocks - 2, 0)
    scores = ops.document_scores(query, key, tokens=layout, rows=rows, num_documents=documents).mean((1, 2))
    candidates = valid[:, 1 : blocks - 1].any(2)
    loss = contrastive_loss(scores, inputs["answer_ids"], config["temperature"], candidates)
    results["doc_scores"], results["aux_loss"] = scores, loss[None]
    results["aux_grad_q"], results["aux_grad_k"] = torch.autograd.grad(loss, (query, key))
    for offset in (8192, 16384):
        results[f"position_ids_{offset}"] = positions(layout, offset)
    return results
