"""Configs of the landmark families: the host's config, where landmarks go and what decoding retrieves."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_attn.checks import require_int, require_one_of
from hf_attn.models.checkpoint import ThinFileConfig

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens", "random", "none")
RETRIEVAL_HEADS = ("each", "kv_group")
# Their frequencies depend on the length of the call, so keys could not be turned to another position afterwards.
_REFUSED_ROPE = ("dynamic", "longrope")


@strict
class LandmarkConfig(ThinFileConfig, PreTrainedConfig):
    """Fields of landmark attention; those below `landmark_block_size` may be changed at load time.

    Args:
        landmark_token_id: id of the landmark; None only in a config that is not ready to build a model.
        landmark_block_size: tokens of a block, its landmark included, >= 2 (the paper's block length plus one).
        landmark_top_k: blocks that a query reads from the cache, >= 1.
        landmark_selection: who shares a set of blocks. "per_token_and_head": nobody; "max_over_heads": the heads of a
            token; "max_over_tokens": the tokens of a chunk. "random" and "none" are controls for evaluation.
        landmark_retrieval_heads: "kv_group" lets the query heads of a KV head share a set.
        landmark_train_length: tokens of a training row, landmarks included; sets the chunk of a cached prefill.
        landmark_chunk_size: tokens of a chunk, a multiple of the block; None: what is left of a training row beside
            `top_k + 1` blocks.
        landmark_insert: whether the model puts landmarks in by itself. False: they are in the input already (made by
            `hf_attn.training.landmark.LandmarkCollator`), and the model runs without a cache.
        landmark_offload: keep cached blocks on the CPU; landmark keys and the open block stay on the device.
        landmark_max_blocks: newest blocks that the cache keeps, >= 1; None for all.
    """

    landmark_token_id: int | None = None
    landmark_block_size: int = 64
    landmark_top_k: int = 4
    landmark_selection: str = "per_token_and_head"
    landmark_retrieval_heads: str = "each"
    landmark_train_length: int = 512
    landmark_chunk_size: int | None = None
    landmark_insert: bool = True
    landmark_offload: bool = False
    landmark_max_blocks: int | None = None

    thin_module = "hf_attn.models.landmark"


@strict
class LandmarkLlamaConfig(LandmarkConfig, LlamaConfig):
    """Llama with landmark attention."""

    model_type = "landmark_llama"
    thin_classes = {"AutoModel": "LandmarkLlamaModel", "AutoModelForCausalLM": "LandmarkLlamaForCausalLM"}


@strict
class LandmarkQwen2Config(LandmarkConfig, Qwen2Config):
    """Qwen2 with landmark attention."""

    model_type = "landmark_qwen2"
    thin_classes = {"AutoModel": "LandmarkQwen2Model", "AutoModelForCausalLM": "LandmarkQwen2ForCausalLM"}


@strict
class LandmarkQwen3Config(LandmarkConfig, Qwen3Config):
    """Qwen3 with landmark attention."""

    model_type = "landmark_qwen3"
    thin_classes = {"AutoModel": "LandmarkQwen3Model", "AutoModelForCausalLM": "LandmarkQwen3ForCausalLM"}


@strict
class LandmarkMistralConfig(LandmarkConfig, MistralConfig):
    """Mistral with landmark attention."""

    model_type = "landmark_mistral"
    thin_classes = {"AutoModel": "LandmarkMistralModel", "AutoModelForCausalLM": "LandmarkMistralForCausalLM"}


def check(config: Any) -> None:
    """Raise ValueError for fields no model can run with, naming the field."""
    size, top_k = config.landmark_block_size, config.landmark_top_k
    require_int("landmark_block_size", size, 2)
    require_int("landmark_top_k", top_k, 1)
    require_int("landmark_train_length", config.landmark_train_length, 1)
    require_one_of("landmark_selection", config.landmark_selection, SELECTIONS)
    require_one_of("landmark_retrieval_heads", config.landmark_retrieval_heads, RETRIEVAL_HEADS)
    if config.landmark_max_blocks is not None:
        require_int("landmark_max_blocks", config.landmark_max_blocks, 1)
    if config.landmark_token_id is None:
        raise ValueError("landmark_token_id is None; name the id of the landmark token (hf_attn.convert sets it)")
    if not 0 <= config.landmark_token_id < config.vocab_size:
        raise ValueError(
            f"landmark_token_id={config.landmark_token_id} is no row of an embedding of {config.vocab_size} tokens; "
            "resize it first (model.resize_token_embeddings), or let hf_attn.convert add the row"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _REFUSED_ROPE:
        raise ValueError(f"landmark attention cannot move keys under rope_type={rope!r}; use 'default', 'linear', "
                         "'llama3' or 'yarn'")  # fmt: skip
    if getattr(config, "attention_dropout", 0):
        raise ValueError(f"landmark attention has no attention dropout, got {config.attention_dropout}; set it to 0")
    windows = getattr(config, "layer_types", None) or []
    if "sliding_attention" in windows or (not windows and getattr(config, "sliding_window", None) is not None):
        raise ValueError(
            f"landmark attention replaces every layer, but this config has sliding windows "
            f"({config.sliding_window} tokens); load it with sliding_window=None (Qwen: use_sliding_window=False)"
        )


def chunk_tokens(config: Any) -> int:
    """Tokens of a chunk of a cached prefill; ValueError when nothing is left of a training row."""
    size, top_k, length = config.landmark_block_size, config.landmark_top_k, config.landmark_train_length
    if config.landmark_chunk_size is not None:
        require_int("landmark_chunk_size", config.landmark_chunk_size, 1)
        if config.landmark_chunk_size % size:
            raise ValueError(
                f"landmark_chunk_size={config.landmark_chunk_size} must be a multiple of landmark_block_size={size}"
            )
        return config.landmark_chunk_size
    chunk = length - length % size - (top_k + 1) * size
    if chunk <= 0:
        raise ValueError(
            f"a training row of {length} tokens has no room for a chunk beside {top_k} + 1 blocks of {size}; lower "
            "landmark_top_k or landmark_block_size, or set landmark_chunk_size"
        )
    return chunk
