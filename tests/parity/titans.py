"""Parity adapter of Titans: every result of a golden file, through the public API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn import ops
from hf_attn.models.titans import ChunkGatedMemory, TitansConfig, titans_mixer

HAS_TRITON = False
_TOKENS = ("q", "k", "v", "theta", "eta", "alpha")
_LINEAR = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")


def run(inputs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Cases of the op, of the four mixers, and of the chunk-gated memory, told apart by their inputs."""
    results = {}
    for name, case in config.items():
        if not isinstance(case, dict):
            continue
        given = {key[len(name) + 1 :]: value for key, value in inputs.items() if key.startswith(f"{name}.")}
        if "grad_out" in given:
            found = _memory(given, case)
        elif "w.persist" in given:
            found = _mixers(given, case, config.get("rms_eps", 1e-6), config.get("rope_theta", 10000.0))
        else:
            found = _chunk_gated(given, case, float(config.get("chunked_variant_rms_eps", 2.0**-52)))
        results |= {f"{name}.{key}": value for key, value in found.items()}
    return results


def _memory(given: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    depth, chunk = case["L"], case["C"]
    tokens = {name: given[name].clone().requires_grad_() for name in _TOKENS}
    start = {
        f"{kind}.{i}": given[f"{kind}.{i}"].clone().requires_grad_() for kind in ("W0", "S0") for i in range(depth)
    }
    weights, momentum = ([start[f"{kind}.{i}"] for i in range(depth)] for kind in ("W0", "S0"))
    options = {"momentum": momentum, "chunk_size": chunk}
    out, final = ops.neural_memory(*tokens.values(), weights, output_final_state=True, **options)
    (out * given["grad_out"]).sum().backward()
    results = {"out": out} | {f"grad.{name}": leaf.grad for name, leaf in (tokens | start).items()}
    results |= _named(W_final=final.weights, S_final=final.momentum, W_chunk_final=final.chunk_start_weights)
    with torch.no_grad():
        early = ops.neural_memory(*tokens.values(), weights, read_before_write=True, **options)
        results["out_read_before_write"] = early
        seen = []
        states = ops.MemoryStates(tuple(weights), tuple(momentum), tuple(weights), 0)
        for t in range(out.shape[2]):
            one = (x[:, :, t : t + 1] for x in tokens.values())
            _, states = ops.neural_memory(
                *one,
                states.weights,
                momentum=states.momentum,
                chunk_start_weights=states.chunk_start_weights,
                chunk_offset=states.chunk_offset,
                chunk_size=chunk,
                output_final_state=True,
            )
            seen.append(states)
        for key, kind in (("W_seq", "weights"), ("S_seq", "momentum")):
            results |= _named(**{key: [torch.stack(s, 2) for s in zip(*(getattr(x, kind) for x in seen), strict=True)]})
        gates = (tokens[name][..., :chunk] for name in ("theta", "eta", "alpha"))
        results |= {f"coef.{key}": value for key, value in ops.memory_coefficients(*gates)._asdict().items()}
    return results


def _named(**lists: Any) -> dict[str, Tensor]:
    return {f"{name}.{index}": tensor for name, many in lists.items() for index, tensor in enumerate(many)}


def _mixers(given: dict[str, Tensor], case: dict[str, Any], eps: float, theta: float) -> dict[str, Tensor]:
    results = {}
    for variant in ("lmm", "mag", "mal", "mac"):
        config = TitansConfig(
            variant=variant,
            hidden_size=case["D"],
            num_attention_heads=case["nh"],
            memory_depth=case["L"],
            memory_inner_size=case["hid"],
            memory_num_heads=case["H"],
            memory_chunk_size=case["C"],
            theta_max=case["lrmax"],
            num_persistent_tokens=case["N"],
            segment_size=case["segment"],
            window=case["window"],
            conv_kernel=case["K"],
            rms_norm_eps=eps,
            rope_theta=theta,
        )
        mixer = titans_mixer(config)
        weights = {_parameter(key[2:]): value for key, value in given.items() if key.startswith("w.")}
        mixer.load_state_dict({name: weights[name] for name in mixer.state_dict()})
        with torch.no_grad():
            results[f"out_{variant}"] = mixer(given["x"])[0]
    return results


def _parameter(name: str) -> str:
    """Name in the golden file -> name in the mixer."""
    kind, _, part = name.partition("_")
    if name in _LINEAR:
        return f"memory.{name}.weight"
    if kind in ("theta", "eta", "alpha"):
        return f"memory.{kind}_proj.{'weight' if part == 'w' else 'bias'}"
    if name in ("aq", "ak", "av", "ao"):
        return f"attention.{name[1]}_proj.weight"
    if name.startswith("mem."):
        return f"memory.memory.{name[4:]}"
    other = {"onorm": "memory.norm", "gy": "attention_norm", "gm": "memory_norm", "persist": "persistent"}
    return other.get(name, f"memory.{name}")


def _chunk_gated(given: dict[str, Tensor], case: dict[str, Any], eps: float) -> dict[str, Tensor]:
    layer = ChunkGatedMemory(
        case["dim"],
        case["heads_"],
        chunk_size=case["chunk"],
        depth=case["depth"],
        expansion=case["exp"],
        theta_max=case["maxlr"],
        gradient_anchor=case["batch"],
        gate_granularity="chunk",
        loss_reduction="mean",
        memory_residual_norm=True,
        norm_eps=eps,
    )
    names = {"mem_gamma": "memory_gamma", "gate_w": "gate_proj.weight"}
    names |= {f"{part}_proj": f"{part}_proj.weight" for part in "qkvo"}
    for gate in ("theta", "eta", "alpha"):
        names |= {f"{gate}_w": f"{gate}_proj.weight", f"{gate}_b": f"{gate}_proj.bias"}
    weights = {key[2:]: value for key, value in given.items() if key.startswith("w.")}
    layer.load_state_dict({names.get(key, key.replace("mem.", "memory.")): value for key, value in weights.items()})
    with torch.no_grad():
        out, states = layer(given["x"])
    results = {"out": out}
    for kind, tensors in (("chunk_weights", states.weights), ("momentum_final", states.momentum)):
        results |= {f"{kind}.mem.{index}": t for index, t in enumerate(tensors[:-1])}
        results[f"{kind}.mem_gamma"] = tensors[-1]
    return results
