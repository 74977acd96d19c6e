"""One prefill of a language model, measured: time, perplexity, captured mass, and a cache that goes on to an answer."""

from __future__ import annotations

import inspect
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_attn.analysis.mass import captured_mass_probe


@dataclass
class Prefill:
    """What one prefill gave.

    seconds: of the model body (no logits, probe taken off); perplexity: of the prompt's own tokens; mass: captured
    attention mass, None when no mechanism was called; cache and last_logits `[1, vocab]`: to continue from.
    """

    seconds: float
    perplexity: float
    mass: float | None
    cache: Any
    last_logits: Tensor


@torch.inference_mode()
def run_body(model: Any, ids: Tensor) -> tuple[Tensor, Any, float]:
    """Hidden states `[1, N, hidden]`, cache, and the seconds the model body took for prompt `ids` `[1, N]`."""
    start = time.perf_counter()
    result = model.base_model(input_ids=ids, use_cache=True)
    seconds = time.perf_counter() - start
    # transformers 5.24 renamed the field.
    return result.last_hidden_state, result["cache" if "cache" in result else "past_key_values"], seconds


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, *, mass_rows: int = 256, logits_chunk: int = 512) -> Prefill:
    """Prefill prompt `ids` `[1, N]` once and take everything from it.

    Args:
        model: a causal language model of transformers with an output embedding.
        mass_rows: query rows per layer sampled for the captured mass; 0 leaves it out.
        logits_chunk: tokens whose logits exist at a time (all of them at once would be N x vocabulary).
    """
    with captured_mass_probe(rows=mass_rows) if mass_rows else nullcontext() as probe:
        hidden, cache, seconds = run_body(model, ids)
    head = model.get_output_embeddings()
    losses = []
    for start in range(0, ids.shape[1] - 1, logits_chunk):
        targets = ids[0, start + 1 : start + 1 + logits_chunk]
        logits = head(hidden[0, start : start + targets.numel()]).float()
        losses.append(cross_entropy(logits, targets, reduction="sum"))
    perplexity = float((torch.stack(losses).sum() / (ids.shape[1] - 1)).exp())
    measured = probe is not None and probe.by_layer
    return Prefill(
        seconds=seconds - (probe.seconds if probe else 0.0),
        perplexity=perplexity,
        mass=probe.mean if measured else None,
        cache=cache,
        last_logits=head(hidden[:, -1]).float(),
    )


@torch.inference_mode()
def greedy_answer(model: Any, start: Prefill, max_new_tokens: int) -> list[int]:
    """Tokens that follow a prefill greedily, until an end token or `max_new_tokens`; uses up the prefill's cache."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    # transformers 5.24 renamed the argument.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    tokens: list[int] = []
    logits = start.last_logits
    while len(tokens) < max_new_tokens:
        token = int(logits[0].argmax())
        if token in ends:
            break
        tokens.append(token)
        result = model(input_ids=torch.tensor([[token]]), use_cache=True, **{cache_name: start.cache})
        logits = result.logits[:, -1].float()
    return tokens
