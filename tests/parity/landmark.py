"""Parity adapter of landmark attention: every result of a golden file, through the public API."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_attn import ops
from hf_attn.caches.landmark import LandmarkStore
from hf_attn.mechanisms._landmark import Chunk, Retrieval, Rotary
from hf_attn.models.landmark.layers import CachedStep, DenseStep

HAS_TRITON = False


def run(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Results of one case: `a` is the op, `b` a layer, whole and behind a cache."""
    results = {}
    if "a" in config:
        results |= {f"a.{name}": tensor for name, tensor in _op(inputs, config["a"]).items()}
    if "b" in config:
        with torch.no_grad():
            results |= {f"b.{name}": tensor for name, tensor in _layer(inputs, config["b"]).items()}
    return results


def _op(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    query, key, value = (inputs[f"a.{name}"].clone().requires_grad_() for name in "qkv")
    size = config["block_size"]
    out = ops.grouped_softmax_attention(query, key, value, block_size=size)
    (out * inputs["a.cot"]).sum().backward()
    # Values that are the identity give the weights.
    tokens = key.shape[2]
    identity = torch.eye(tokens, dtype=key.dtype).expand(*key.shape[:2], tokens, tokens)
    weights = ops.grouped_softmax_attention(query[:, :, -1:].detach(), key.detach(), identity, block_size=size)
    grads = {f"grad_{name}": t.grad for name, t in zip("qkv", (query, key, value), strict=True)}
    return {"out": out, "weights_row_last": weights[:, :, 0], **grads}


def _layer(inputs: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    heads, kv_heads, dim, size = (config[n] for n in ("num_heads", "num_kv_heads", "head_dim", "block_size"))
    model = AutoModel.from_config(
        AutoConfig.for_model(
            "landmark_llama",
            vocab_size=2,
            hidden_size=heads * dim,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            landmark_token_id=1,
            landmark_block_size=size,
            landmark_top_k=config["top_k"],
        )
    ).eval()
    layer, states = model.layers[0].self_attn, inputs["b.x"]
    for name in ("q", "k", "v", "o"):
        getattr(layer, f"{name}_proj").weight.copy_(inputs[f"b.w_{name}"])
    positions = torch.arange(states.shape[1])[None]
    rotation = model.rotary_emb(states, positions)
    results = {"y_full": layer(states, rotation, landmark_step=DenseStep(size, None, None))[0]}

    for mode in config.get("modes", ["per_token_and_head", "max_over_tokens"]):
        chosen: list[Tensor] = []
        retrieval = replace(Retrieval.of(model.config), selection=mode, keep=chosen.append)
        store, parts, start = LandmarkStore(size), [], 0
        for count in config["chunks"]:
            chunk = Chunk([count] * states.shape[0], count, "cpu")
            step = CachedStep(chunk, [store], Rotary.of(model.rotary_emb), retrieval)
            parts.append(layer(states[:, start : start + count], landmark_step=step)[0])
            store.commit()
            start += count
        results[f"y_{mode}"] = torch.cat(parts, 1)
        results[f"selected_last_{mode}"] = chosen[-1].to(torch.int32)
    return results
