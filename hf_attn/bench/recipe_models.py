"""What a recipe starts from: a pretrained language model, or a tiny random one that needs no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_attn.bench.models import byte_tokenizer, load_language_model
from hf_attn.training.data import BYTE_VOCABULARY, byte_ids

RANDOM = "random"


def random_llama(vocabulary: int, **sizes: Any) -> LlamaForCausalLM:
    """A Llama with random weights; `sizes` are fields of its config, which names no special tokens by default."""
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, **sizes})
    )


def base_with_tokenizer(name: str | None, sizes: dict[str, Any], *, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer.

    Args:
        name: as in `load_language_model`, or "random": a Llama of `sizes` over the tokens of `byte_tokenizer`.
        sizes: fields of the random model's config.
        dtype: of a pretrained model's weights; a random one is float32.
    """
    if name != RANDOM:
        return load_language_model(name, getattr(torch, dtype))
    tokenizer = byte_tokenizer()
    return random_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes), tokenizer


def base_with_encoder(
    name: str | None, sizes: dict[str, Any], *, dtype: str = "float32"
) -> tuple[Any, Callable[[str], list[int]]]:
    """Model, and a function from text to token ids without special tokens; "random" reads bytes.

    Arguments as in `base_with_tokenizer`.
    """
    if name == RANDOM:
        return random_llama(BYTE_VOCABULARY, **sizes), byte_ids
    model, tokenizer = load_language_model(name, getattr(torch, dtype))
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
